//! Typed access to the fields of a `config.json`.

use serde_json::{Map, Value};

use super::ConfigError;

/// Typed access to the top-level object.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    /// Present and not null, false or empty.
    pub(super) fn is_set(&self, field: &str) -> bool {
        match self.0.get(field) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Object(object)) => !object.is_empty(),
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(_) => true,
        }
    }

    pub(super) fn is_null(&self, field: &str) -> bool {
        matches!(self.0.get(field), Some(Value::Null))
    }

    pub(super) fn optional_count(&self, field: &'static str) -> Result<Option<usize>, ConfigError> {
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_u64()
                .filter(|&count| count <= MAX_SIZE)
                .and_then(|count| usize::try_from(count).ok())
                .map(Some)
                .ok_or(ConfigError::Invalid {
                    field,
                    expected: "a whole number up to 2^24",
                }),
        }
    }

    pub(super) fn optional_size(&self, field: &'static str) -> Result<Option<usize>, ConfigError> {
        match self.optional_count(field)? {
            Some(0) => Err(ConfigError::Invalid {
                field,
                expected: "a positive whole number",
            }),
            found => Ok(found),
        }
    }

    pub(super) fn size(&self, field: &'static str) -> Result<usize, ConfigError> {
        self.optional_size(field)?
            .ok_or(ConfigError::Missing { field })
    }

    pub(super) fn flag(&self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(ConfigError::Invalid {
                field,
                expected: "true or false",
            }),
        }
    }

    pub(super) fn rms_norm_eps(&self) -> Result<f32, ConfigError> {
        let field = "rms_norm_eps";
        match self.0.get(field) {
            None => Ok(1e-6),
            Some(value) => value
                .as_f64()
                .filter(|&eps| eps > 0.0 && eps < 1.0)
                .map(crate::rope::narrow)
                .ok_or(ConfigError::Invalid {
                    field,
                    expected: "a number between 0 and 1",
                }),
        }
    }

    /// One id, a list of ids, or none.
    pub(super) fn token_ids(&self, field: &'static str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or(ConfigError::Invalid {
                    field,
                    expected: "token ids",
                })
        };
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    /// For each layer, whether its attention slides. `None` when not listed.
    pub(super) fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>, ConfigError> {
        let field = "layer_types";
        let kinds = match self.0.get(field) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(kinds)) => kinds,
            Some(_) => {
                return Err(ConfigError::Invalid {
                    field,
                    expected: "a list",
                });
            }
        };
        if kinds.len() != layers {
            return Err(ConfigError::Invalid {
                field,
                expected: "one entry per layer",
            });
        }
        kinds
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => Err(ConfigError::Unsupported {
                    field,
                    found: kind.to_string(),
                    reason: "only full_attention and sliding_attention are implemented",
                }),
            })
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }
}

/// Bounds every count in a config, so that products of a few of them fit in
/// 64 bits whatever a hostile file says.
const MAX_SIZE: u64 = 1 << 24;
