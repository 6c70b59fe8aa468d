//! Fields that both kinds of generation request have.
//!
//! Fields we do not know are ignored, as OpenAI's clients send many. Fields we
//! know and do not support are refused when they would change the answer.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Front;
use super::error::ApiError;
use crate::sampling::SamplingParams;

/// A JSON object whose fields are read one by one, so that an error can name one.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a request's body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body)
            .map(Self)
            .map_err(ApiError::Json)
    }

    /// The field's value; none when it is absent or null.
    pub(super) fn get<T: DeserializeOwned>(
        &self,
        param: &'static str,
    ) -> Result<Option<T>, ApiError> {
        match self.0.get(param) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|source| ApiError::Type { param, source }),
        }
    }

    /// A number of tokens to generate.
    pub(super) fn max_tokens(&self, param: &'static str) -> Result<Option<usize>, ApiError> {
        match self.get(param)? {
            Some(0) => Err(ApiError::Value {
                param,
                rule: "must be at least 1",
            }),
            other => Ok(other),
        }
    }

    /// Refuses what we know and do not do.
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let refuse = |param, rule| Err(ApiError::Value { param, rule });
        for param in ["n", "best_of"] {
            if self.get::<u64>(param)?.is_some_and(|n| n != 1) {
                return refuse(param, "must be 1; send several requests instead");
            }
        }
        for param in ["presence_penalty", "frequency_penalty"] {
            if self
                .get::<f64>(param)?
                .is_some_and(|penalty| penalty != 0.0)
            {
                return refuse(param, "is not supported");
            }
        }
        let biases = self.get::<Map<String, Value>>("logit_bias")?;
        if biases.is_some_and(|biases| !biases.is_empty()) {
            return refuse("logit_bias", "is not supported");
        }
        let format = self.get::<Value>("response_format")?;
        if format.is_some_and(|format| format["type"] != "text") {
            return refuse("response_format", "must be of type text");
        }
        Ok(())
    }
}

/// What completions and chats have in common.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) sampling: SamplingParams,
    /// At most [`STOP_STRINGS`], none empty.
    pub(super) stop: Vec<String>,
    /// End the sequence beside the model's own stop tokens; at most
    /// [`STOP_TOKENS`].
    pub(super) stop_token_ids: Vec<u32>,
    /// Whether the model's own stop tokens are ignored.
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) kvasir: KvasirOptions,
}

impl Common {
    /// Checks the fields against what `front` serves.
    pub(super) fn parse(fields: &Fields, front: &Front) -> Result<Self, ApiError> {
        if let Some(model) = fields.get::<String>("model")?
            && model != front.model
        {
            return Err(ApiError::Model(model));
        }
        fields.refuse_unsupported()?;
        let stream = fields.get("stream")?.unwrap_or(false);
        let options = fields.get::<StreamOptions>("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::Value {
                param: "stream_options",
                rule: "needs stream to be true",
            });
        }
        Ok(Self {
            sampling: sampling(fields, &front.defaults.sampling)?,
            stop: stop_strings(fields)?,
            stop_token_ids: stop_tokens(fields)?,
            ignore_eos: fields.get("ignore_eos")?.unwrap_or(false),
            stream,
            include_usage: options.is_some_and(|options| options.include_usage),
            kvasir: fields.get("kvasir")?.unwrap_or_default(),
        })
    }
}

/// `kvasir` of a request.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct KvasirOptions {
    pub(super) read_cache: bool,
    pub(super) write_cache: bool,
    pub(super) logits_digest: bool,
}

impl Default for KvasirOptions {
    fn default() -> Self {
        Self {
            read_cache: true,
            write_cache: true,
            logits_digest: false,
        }
    }
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn sampling(fields: &Fields, defaults: &SamplingParams) -> Result<SamplingParams, ApiError> {
    let temperature = fields.get("temperature")?;
    let top_p = fields.get("top_p")?;
    let top_k = match fields.get::<i64>("top_k")? {
        None => defaults.top_k(),
        // As other servers have it, 0 and -1 switch it off.
        Some(0 | -1) => None,
        Some(k) => Some(usize::try_from(k).map_err(|_| ApiError::Value {
            param: "top_k",
            rule: "must be at least -1",
        })?),
    };
    Ok(SamplingParams::new(
        temperature.unwrap_or(defaults.temperature()),
        top_k,
        top_p.unwrap_or(defaults.top_p()),
        fields.get::<Seed>("seed")?.map(Seed::bits),
    )?)
}

/// OpenAI's seeds are signed, ours are not; both ranges are taken.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected an integer of 64 bits")]
enum Seed {
    Unsigned(u64),
    Signed(i64),
}

impl Seed {
    fn bits(self) -> u64 {
        match self {
            Self::Unsigned(seed) => seed,
            Self::Signed(seed) => seed.cast_unsigned(),
        }
    }
}

fn stop_strings(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let param = "stop";
    let stop = match fields.get(param)? {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stop)) => stop,
    };
    let rule = if stop.len() > STOP_STRINGS {
        "may hold at most 4 strings"
    } else if stop.iter().any(String::is_empty) {
        "may not hold an empty string"
    } else if stop.iter().any(|stop| stop.len() > STOP_BYTES) {
        "may not hold a string of more than 1024 bytes"
    } else {
        return Ok(stop);
    };
    Err(ApiError::Value { param, rule })
}

fn stop_tokens(fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let param = "stop_token_ids";
    let ids: Vec<u32> = fields.get(param)?.unwrap_or_default();
    if ids.len() > STOP_TOKENS {
        let rule = "may hold at most 64 tokens";
        return Err(ApiError::Value { param, rule });
    }
    Ok(ids)
}

/// Each token is compared with all of them.
const STOP_TOKENS: usize = 64;

/// As OpenAI's limit.
const STOP_STRINGS: usize = 4;

/// Each token is compared with every beginning of a stop string.
const STOP_BYTES: usize = 1024;
