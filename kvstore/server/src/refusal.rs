//! What the store's errors are on the wire.

use std::error::Error;
use std::io::ErrorKind::{QuotaExceeded, StorageFull};
use std::time::Duration;

use kvasir_proto::{InvalidField, status};
use kvasir_store::{
    DeviceError, GetProfileError, HoldRefused, PinRefused, PutError, PutProfileError, Throttled,
    WriteError,
};
use tonic::Status;

pub(crate) fn throttled(error: &Throttled) -> Status {
    if error.wanted > error.capacity {
        return too_large(error);
    }
    status::come_back(error.to_string(), READERS_LET_GO)
}

/// No waiting will make it fit.
fn too_large(error: &dyn Error) -> Status {
    InvalidField::new(
        "header.layout",
        format!("{error}; raise the capacity, or use fewer tokens per chunk"),
    )
    .into()
}

pub(crate) fn put(error: &PutError) -> Status {
    match error {
        PutError::Throttled(error) => throttled(error),
        PutError::Write(error @ WriteError::TooLarge { .. }) => too_large(error),
        error => device(error),
    }
}

pub(crate) fn put_profile(error: &PutProfileError) -> Status {
    match error {
        PutProfileError::Size(_) => InvalidField::new("header.bytes", error).into(),
        PutProfileError::Digest { .. } => InvalidField::new("header.digest", error).into(),
        PutProfileError::Length { .. } | PutProfileError::Profile(_) => {
            InvalidField::new("data", error).into()
        }
        // Waiting does not help: nothing is evicted.
        PutProfileError::Full { .. } | PutProfileError::TooMany => {
            Status::resource_exhausted(error.to_string())
        }
        PutProfileError::Throttled(error) => memory_for_profile(error),
        PutProfileError::Device(DeviceError::Io(error))
            if matches!(error.kind(), StorageFull | QuotaExceeded) =>
        {
            let problem = "the file system of the data directory is full; make room there";
            Status::resource_exhausted(problem)
        }
        error => device(error),
    }
}

pub(crate) fn get_profile(error: &GetProfileError) -> Status {
    match error {
        GetProfileError::Throttled(error) => memory_for_profile(error),
        error => device(error),
    }
}

fn memory_for_profile(error: &Throttled) -> Status {
    if error.wanted > error.capacity {
        let problem = format!("{error}; raise `capacity` of `[memory]`");
        return Status::resource_exhausted(problem);
    }
    throttled(error)
}

/// `None` where the keys changed meanwhile.
pub(crate) fn pin(error: &PinRefused) -> Option<Status> {
    match error {
        PinRefused::Missing(_) => None,
        // No waiting will make them fit.
        PinRefused::OverLimit { wanted, limit, .. } if wanted > limit => {
            Some(InvalidField::new("keys", error).into())
        }
        error => Some(status::come_back(error.to_string(), PINS_END)),
    }
}

pub(crate) fn hold(refused: &HoldRefused) -> Status {
    // No waiting will make them fit.
    if refused.wanted > refused.limit {
        return InvalidField::new("acquire.keys", refused).into();
    }
    status::come_back(refused.to_string(), LEASES_END)
}

pub(crate) fn delete(error: &DeviceError) -> Status {
    device(error)
}

fn device(error: &dyn Error) -> Status {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    tracing::error!(error = message, "the device failed");
    Status::internal(message)
}

/// Readers hold memory for as long as a transfer takes.
const READERS_LET_GO: Duration = Duration::from_millis(50);
/// As long as it takes to use what was leased.
const LEASES_END: Duration = Duration::from_millis(200);
/// Pins last longer.
const PINS_END: Duration = Duration::from_secs(1);
