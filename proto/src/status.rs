//! The refusals every server of this protocol speaks, with machine-readable details.

use std::time::Duration;

use bytes::Bytes;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{InvalidField, v1};

/// `INVALID_ARGUMENT` with a `BadRequest` that names the field.
impl From<InvalidField> for Status {
    fn from(error: InvalidField) -> Self {
        let details = ErrorDetails::with_bad_request_violation(&error.field, &error.problem);
        Self::with_error_details(Code::InvalidArgument, error.to_string(), details)
    }
}

/// `RESOURCE_EXHAUSTED` with a `RetryInfo`: nothing was done; come back after `delay`.
pub fn come_back(reason: impl Into<String>, delay: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(delay));
    Status::with_error_details(Code::ResourceExhausted, reason, details)
}

/// How long a refusal asks its caller to wait, if it is one made by [`come_back`].
pub fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// The first field a refusal complains about, if it names one.
pub fn first_violation(status: &Status) -> Option<InvalidField> {
    let violations = status.get_details_bad_request()?.field_violations;
    let violation = violations.into_iter().next()?;
    Some(InvalidField::new(violation.field, violation.description))
}

/// A status as a request of the data plane is refused with.
pub fn to_refusal(status: &Status) -> v1::Refusal {
    v1::Refusal {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: Bytes::copy_from_slice(status.details()),
    }
}

/// The status of a refusal.
pub fn from_refusal(refusal: v1::Refusal) -> Status {
    let v1::Refusal {
        code,
        message,
        details,
    } = refusal;
    Status::with_details(Code::from_i32(code), message, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_survive_the_status() {
        let status = Status::from(InvalidField::new("keys[3]", "too short"));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(
            first_violation(&status),
            Some(InvalidField::new("keys[3]", "too short"))
        );
        assert_eq!(retry_delay(&status), None);
        let status = come_back("budget", Duration::from_millis(50));
        assert_eq!(retry_delay(&status), Some(Duration::from_millis(50)));
        let status = from_refusal(to_refusal(&status));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "budget");
        assert_eq!(retry_delay(&status), Some(Duration::from_millis(50)));
    }
}
