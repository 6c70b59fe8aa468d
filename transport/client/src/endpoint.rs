//! Where a daemon listens.

use std::fmt;
use std::str::FromStr;

use tonic::codegen::http::uri as http_uri;

/// Address of a daemon: `HOST:PORT`, with or without `http://`.
///
/// ```
/// use kvasir_client::Endpoint;
///
/// let endpoint: Endpoint = "127.0.0.1:7420".parse()?;
/// assert_eq!(endpoint.to_string(), "http://127.0.0.1:7420");
/// assert_eq!(endpoint, Endpoint::default());
/// assert!("127.0.0.1".parse::<Endpoint>().is_err());
/// # Ok::<(), kvasir_client::ParseEndpointError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(http_uri::Uri);

/// Text that is not an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an endpoint; write HOST:PORT or http://HOST:PORT, such as {DEFAULT}")]
pub struct ParseEndpointError(String);

impl Endpoint {
    pub(crate) const fn uri(&self) -> &http_uri::Uri {
        &self.0
    }
}

impl Default for Endpoint {
    /// Where a daemon without configuration listens: `http://127.0.0.1:7420`.
    fn default() -> Self {
        Self(http_uri::Uri::from_static(DEFAULT))
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseEndpointError(text.to_owned());
        let address = text.trim().trim_end_matches('/');
        let address = address.strip_prefix("http://").unwrap_or(address);
        let authority: http_uri::Authority = address.parse().map_err(|_| error())?;
        if authority.host().is_empty() || authority.port_u16().is_none() {
            return Err(error());
        }
        http_uri::Builder::new()
            .scheme(http_uri::Scheme::HTTP)
            .authority(authority)
            .path_and_query("")
            .build()
            .map(Self)
            .map_err(|_| error())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "http://{}",
            self.0.authority().map_or("", |a| a.as_str())
        )
    }
}

const DEFAULT: &str = "http://127.0.0.1:7420";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for text in ["127.0.0.1:7420", " http://127.0.0.1:7420/ "] {
            assert_eq!(text.parse(), Ok(Endpoint::default()));
        }
        let named: Endpoint = "cache.example:80".parse().unwrap();
        assert_eq!(named.to_string(), "http://cache.example:80");
        assert!("[::1]:7420".parse::<Endpoint>().is_ok());
        for bad in ["", "7420", "host", "host:", "https://host:1", "host:99999"] {
            let error = bad.parse::<Endpoint>().unwrap_err();
            assert!(error.to_string().contains("HOST:PORT"), "{bad}");
        }
    }
}
