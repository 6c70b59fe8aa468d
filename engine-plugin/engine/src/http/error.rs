//! Refusals, in OpenAI's shape: `{"error": {message, type, param, code}}`.

use std::error::Error as _;

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::chat::ChatError;
use crate::request::RequestError;
use crate::sampling::InvalidSampling;
use crate::tokenizer::{DecodeError, EncodeError};

/// Why a request has no answer. Its `Display` is the message a client sees.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// The path is not one of ours.
    #[error("no such route")]
    NoRoute,
    /// The path is one of ours, with another method.
    #[error("this route does not support the method")]
    WrongMethod,
    /// The body is too large or did not arrive.
    #[error("the request's body cannot be read")]
    Body(#[source] BytesRejection),
    /// The body is not a JSON object.
    #[error("the request's body must be a JSON object")]
    Json(#[source] serde_json::Error),
    /// A field is of another type.
    #[error("{param} is invalid")]
    Type {
        param: &'static str,
        source: serde_json::Error,
    },
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's value is not one we take.
    #[error("{param} {rule}")]
    Value {
        param: &'static str,
        rule: &'static str,
    },
    /// A sampling field is out of range.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
    /// Another model was asked for.
    #[error("the model {0:?} does not exist; GET /v1/models names the one served here")]
    Model(String),
    /// The messages have no prompt text.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The prompt has no tokens in the vocabulary.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The generated tokens have no text.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The scheduler refused or gave up.
    #[error("{error}")]
    Engine {
        /// The field that holds the prompt.
        param: &'static str,
        error: RequestError,
    },
    /// Too many requests wait to be parsed and encoded.
    #[error("too many requests are being read; try again later")]
    Busy,
    /// The engine is starting or shutting down.
    #[error("the engine is not ready; try again later")]
    NotReady,
    /// The scheduler ended without ending the sequence.
    #[error("the engine stopped before the sequence ended")]
    Stopped,
    /// Parsing or encoding panicked.
    #[error("the request could not be prepared")]
    Worker(#[source] tokio::task::JoinError),
}

impl ApiError {
    /// The status a response starts with.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoRoute | Self::Model(_) => StatusCode::NOT_FOUND,
            Self::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::Body(rejection) => rejection.status(),
            Self::Json(_)
            | Self::Type { .. }
            | Self::Missing(_)
            | Self::Value { .. }
            | Self::Sampling(_)
            | Self::Encode(_)
            | Self::Chat(_) => StatusCode::BAD_REQUEST,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::NotReady => StatusCode::SERVICE_UNAVAILABLE,
            Self::Engine { error, .. } => match error {
                RequestError::EmptyPrompt
                | RequestError::UnknownToken { .. }
                | RequestError::Chunks
                | RequestError::TooLong { .. } => StatusCode::BAD_REQUEST,
                RequestError::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
                // Another try finds other pages, or a disk that works again.
                RequestError::ShuttingDown | RequestError::Pages(_) => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                RequestError::NotFinite | RequestError::Internal => {
                    StatusCode::INTERNAL_SERVER_ERROR
                }
            },
            Self::Decode(_) | Self::Stopped | Self::Worker(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The field at fault.
    fn param(&self) -> Option<&'static str> {
        match self {
            Self::Type { param, .. } | Self::Missing(param) | Self::Value { param, .. } => {
                Some(param)
            }
            Self::Sampling(invalid) => Some(invalid.field()),
            Self::Model(_) => Some("model"),
            Self::Chat(_) => Some("messages"),
            Self::Encode(_) => Some("prompt"),
            Self::Engine {
                param,
                error:
                    RequestError::EmptyPrompt
                    | RequestError::UnknownToken { .. }
                    | RequestError::Chunks
                    | RequestError::TooLong { .. },
            } => Some(param),
            _ => None,
        }
    }

    /// A word for programs, where OpenAI has one or a program could act on it.
    fn code(&self) -> Option<&'static str> {
        match self {
            Self::Model(_) => Some("model_not_found"),
            Self::Busy => Some("rate_limit_exceeded"),
            Self::NotReady => Some("not_ready"),
            Self::Chat(ChatError::NoTemplate) => Some("no_chat_template"),
            Self::Engine { error, .. } => match error {
                RequestError::TooLong { .. } => Some("context_length_exceeded"),
                RequestError::Overloaded { .. } => Some("rate_limit_exceeded"),
                RequestError::ShuttingDown => Some("shutting_down"),
                RequestError::Pages(_) => Some("kv_pages"),
                _ => None,
            },
            _ => None,
        }
    }

    /// The body, also sent as an event when a stream has started.
    pub(super) fn json(&self) -> Value {
        let kind = match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message(),
            "type": kind,
            "param": self.param(),
            "code": self.code(),
        }})
    }

    /// The message with its causes, when they are of the client's making.
    fn message(&self) -> String {
        let mut message = self.to_string();
        if self.status().is_client_error() {
            let mut cause = self.source();
            while let Some(error) = cause {
                message += ": ";
                message += &error.to_string();
                cause = error.source();
            }
        }
        message
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::warn!(error = &self as &dyn std::error::Error, "request failed");
        }
        let mut response = (status, Json(self.json())).into_response();
        if matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
