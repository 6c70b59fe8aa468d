//! Streams that a task fills and a receiver may abandon.

use std::sync::Arc;

use futures::stream::{BoxStream, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::admission::shutting_down;
use crate::service::Shared;

pub(crate) type Messages<T> = BoxStream<'static, Result<T, Status>>;

/// Sends to one receiver.
pub(crate) struct Sender<T> {
    shared: Arc<Shared>,
    messages: mpsc::Sender<Result<T, Status>>,
}

/// The receiver is gone or stuck, or the store is gone.
pub(crate) struct Over;

/// Runs `fill` as a watcher until it ends, its receiver does, or the server does.
pub(crate) fn serve<T, F>(
    shared: Arc<Shared>,
    fill: impl FnOnce(Sender<T>) -> F,
) -> Result<Messages<T>, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<(), Over>> + Send + 'static,
{
    let permit = shared.admission.watcher()?;
    let (messages, receiver) = mpsc::channel(SEND_QUEUE);
    let last = messages.clone();
    let filled = fill(Sender {
        shared: Arc::clone(&shared),
        messages,
    });
    tokio::spawn(async move {
        let _permit = permit;
        tokio::select! {
            () = shared.admission.draining.cancelled() => {
                // A receiver that reads nothing is not waited for.
                let _ = last.try_send(Err(shutting_down()));
            }
            () = last.closed() => (),
            _ = filled => (),
        }
    });
    Ok(ReceiverStream::new(receiver).boxed())
}

impl<T> Sender<T> {
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) async fn send(&self, message: Result<T, Status>) -> Result<(), Over> {
        let idle = self.shared.limits.stream_idle();
        match timeout(idle, self.messages.send(message)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Over),
        }
    }
}

/// Messages between the task and the socket.
const SEND_QUEUE: usize = 16;
