//! Routes that run no model.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Front;
use super::error::ApiError;

/// `GET /v1/models`.
pub(super) async fn models(State(front): State<Arc<Front>>) -> Json<Value> {
    Json(json!({
        "object": "list",
        "data": [{
            "id": front.model,
            "object": "model",
            "created": unix_seconds(),
            "owned_by": "kvasir",
            "max_model_len": front.limits.context_tokens,
        }],
    }))
}

/// `GET /health`.
pub(super) async fn health(State(front): State<Arc<Front>>) -> Response {
    let (status, word) = if front.ready.load(Ordering::Acquire) {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready")
    };
    (status, Json(json!({ "status": word }))).into_response()
}

/// `GET /metrics`.
pub(super) async fn metrics(State(front): State<Arc<Front>>) -> Response {
    let Some(recorder) = &front.metrics else {
        return ApiError::NoRoute.into_response();
    };
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (kind, recorder.render()).into_response()
}

/// Any other path.
pub(super) async fn no_route() -> ApiError {
    ApiError::NoRoute
}

/// A known path with another method.
pub(super) async fn wrong_method() -> ApiError {
    ApiError::WrongMethod
}

/// Now, for the `created` fields.
pub(super) fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // Informative only: a clock before 1970 need not fail a request.
    now.map_or(0, |since| since.as_secs())
}
