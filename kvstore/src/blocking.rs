//! Work that would stall the async threads.

use tokio::task::JoinHandle;

use crate::tier::DeviceError;

/// Runs `work` on the runtime's blocking threads. Once started it runs to its end,
/// even if the future is dropped. A panic in `work` continues in the caller.
///
/// # Errors
/// The runtime is shutting down.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DeviceError> {
    joined(tokio::task::spawn_blocking(work)).await
}

/// What a task gave. Its panic continues in the caller.
///
/// # Errors
/// The runtime is shutting down.
pub(crate) async fn joined<T>(task: JoinHandle<T>) -> Result<T, DeviceError> {
    match task.await {
        Ok(value) => Ok(value),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(DeviceError::Closed),
        },
    }
}
