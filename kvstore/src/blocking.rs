//! Work that would stall the async threads.

use crate::tier::DeviceError;

/// Runs `work` on the runtime's blocking threads. Once started it runs to its end,
/// even if the future is dropped. A panic in `work` continues in the caller.
///
/// # Errors
/// The runtime is shutting down.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DeviceError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Ok(value),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(DeviceError::Closed),
        },
    }
}
