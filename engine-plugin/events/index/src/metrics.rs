//! `GET /metrics` for Prometheus, and `GET /health`.
//!
//! | metric | kind | labels |
//! |---|---|---|
//! | `kvasir_index_standing` | gauge: 0 behind, 1 partial, 2 complete | `publisher`, `rank` |
//! | `kvasir_index_blocks` | gauge | likewise |
//! | `kvasir_index_refused_blocks` | gauge | likewise |
//! | `kvasir_index_batches_total`, `…_duplicates_total`, `…_gaps_total`, `…_restarts_total`, `…_replays_total`, `…_malformed_total`, `…_unknown_total` | counter | likewise, of engines |
//! | `kvasir_index_snapshots_total` | counter | likewise, of daemons |

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Extract;
use axum::routing::get;
use kvasir_events::{Source, Standing};
use metrics::{Label, counter, gauge, with_local_recorder};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::net::TcpListener;

use crate::state::State;

pub(crate) async fn serve(
    listener: TcpListener,
    state: Arc<State>,
    ended: impl Future<Output = ()> + Send + 'static,
) {
    let router = Router::new()
        .route("/metrics", get(text))
        .route("/health", get(|| async { "ok\n" }))
        .with_state(state);
    let serve = axum::serve(listener, router).with_graceful_shutdown(ended);
    if let Err(error) = serve.await {
        tracing::error!(%error, "metrics are no longer served");
    }
}

async fn text(Extract(state): Extract<Arc<State>>) -> String {
    // What is kept is kept by the index; here it is written down.
    let recorder = PrometheusBuilder::new().build_recorder();
    with_local_recorder(&recorder, || record(&state));
    recorder.handle().render()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "metrics are floating-point numbers"
)]
fn record(state: &State) {
    state.read(|index| {
        for (id, source) in index.sources() {
            let labels = vec![
                Label::new("publisher", id.name.clone()),
                Label::new("rank", id.rank.to_string()),
            ];
            let count = |name: &'static str, value| counter!(name, labels.clone()).absolute(value);
            let (standing, blocks, refused) = match source {
                Source::Engine(it) => {
                    let counts = it.counts();
                    count("kvasir_index_batches_total", counts.batches);
                    count("kvasir_index_duplicates_total", counts.duplicates);
                    count("kvasir_index_gaps_total", counts.gaps);
                    count("kvasir_index_restarts_total", counts.restarts);
                    count("kvasir_index_replays_total", counts.replays);
                    count("kvasir_index_malformed_total", counts.malformed);
                    count("kvasir_index_unknown_total", counts.unknown);
                    (it.standing(), it.blocks(), it.refused())
                }
                Source::Daemon(it) => {
                    count("kvasir_index_snapshots_total", it.snapshots());
                    (it.standing(), it.position().0, it.refused())
                }
            };
            let standing = match standing {
                Standing::Behind => 0.0,
                Standing::Partial => 1.0,
                Standing::Complete => 2.0,
            };
            gauge!("kvasir_index_standing", labels.clone()).set(standing);
            gauge!("kvasir_index_blocks", labels.clone()).set(blocks as f64);
            gauge!("kvasir_index_refused_blocks", labels.clone()).set(refused as f64);
        }
    });
}
