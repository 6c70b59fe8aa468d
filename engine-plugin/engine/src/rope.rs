//! Rotary position embedding: frequencies per rope type.
//!
//! Follows `modeling_rope_utils.py` of transformers 5 in operation order and
//! precision: frequencies are f32 throughout, so that angles at large positions
//! round the same way. Types: `default`, `linear`, `llama3`, `yarn` (Peng et
//! al., arXiv 2309.00071).
//!
//! Not here: applying the rotation ([`crate::kernels::rotate`]).

use std::f64::consts::PI;

use serde_json::{Map, Value};

use crate::config::ConfigError;

/// A checked RoPE description: base, and how frequencies are rescaled.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than in pretraining.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`: not at all.
    None,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// `llama3`: long wavelengths divided by `factor`, short ones kept.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are short.
        high_freq_factor: f64,
        /// Positions in pretraining, in tokens.
        original_max_positions: f64,
    },
    /// `yarn`: interpolated per dimension by number of rotations.
    Yarn {
        /// Divisor of interpolated frequencies.
        factor: f64,
        /// Multiplies cos and sin; already derived from `mscale` if absent.
        attention_factor: f64,
        /// Rotations above which a dimension is extrapolated.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Round the bounds of the ramp to whole dimensions.
        truncate: bool,
        /// Positions in pretraining, in tokens.
        original_max_positions: f64,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` with
    /// `rope_theta` (before), from the top-level object of a `config.json`.
    ///
    /// # Errors
    ///
    /// A [`ConfigError`] naming the field, for unknown types and bad numbers.
    pub fn from_json(
        object: &Map<String, Value>,
        max_positions: usize,
    ) -> Result<Self, ConfigError> {
        let empty = Map::new();
        let (field, parameters) = match (object.get("rope_scaling"), object.get("rope_parameters"))
        {
            // transformers lets a non-empty rope_scaling win.
            (Some(Value::Object(scaling)), _) if !scaling.is_empty() => ("rope_scaling", scaling),
            (None | Some(Value::Null | Value::Object(_)), Some(Value::Object(parameters))) => {
                ("rope_parameters", parameters)
            }
            (None | Some(Value::Null | Value::Object(_)), None | Some(Value::Null)) => {
                ("rope_scaling", &empty)
            }
            (None | Some(Value::Null | Value::Object(_)), Some(_)) => {
                return Err(ConfigError::Invalid {
                    field: "rope_parameters",
                    expected: "an object",
                });
            }
            (Some(_), _) => {
                return Err(ConfigError::Invalid {
                    field: "rope_scaling",
                    expected: "an object",
                });
            }
        };
        if parameters.values().any(Value::is_object) {
            return Err(ConfigError::Unsupported {
                field,
                found: "one description per layer type".to_owned(),
                reason: "only one RoPE for all layers is implemented",
            });
        }
        let numbers = Numbers { field, parameters };
        if numbers
            .optional("partial_rotary_factor")?
            .is_some_and(|part| part != 1.0)
        {
            return Err(ConfigError::Unsupported {
                field,
                found: "partial_rotary_factor".to_owned(),
                reason: "RoPE over part of a head is not implemented",
            });
        }
        let theta = match numbers.optional("rope_theta")? {
            Some(theta) => theta,
            None => Numbers {
                field: "rope_theta",
                parameters: object,
            }
            .optional("rope_theta")?
            .unwrap_or(10_000.0),
        };
        let kind = ["rope_type", "type"]
            .into_iter()
            .find_map(|key| parameters.get(key))
            .map_or(Some("default"), Value::as_str);
        // transformers gives a top-level value priority over the nested one.
        let original_max_positions = || -> Result<f64, ConfigError> {
            let field = "original_max_position_embeddings";
            if let Some(value) = (Numbers {
                field,
                parameters: object,
            })
            .optional(field)?
            {
                return Ok(value);
            }
            #[expect(clippy::cast_precision_loss, reason = "sizes are at most 2^24")]
            Ok(numbers.optional(field)?.unwrap_or(max_positions as f64))
        };
        let scaling = match kind {
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear {
                factor: numbers.required("factor")?,
            },
            Some("llama3") => RopeScaling::Llama3 {
                factor: numbers.required("factor")?,
                low_freq_factor: numbers.required("low_freq_factor")?,
                high_freq_factor: numbers.required("high_freq_factor")?,
                original_max_positions: original_max_positions()?,
            },
            Some("yarn") => {
                let original_max_positions = original_max_positions()?;
                #[expect(clippy::cast_precision_loss, reason = "sizes are at most 2^24")]
                let factor = match numbers.optional("factor")? {
                    Some(factor) => factor,
                    None => max_positions as f64 / original_max_positions,
                };
                let attention_factor = match numbers.optional("attention_factor")? {
                    Some(factor) => factor,
                    None => match (
                        numbers.optional("mscale")?,
                        numbers.optional("mscale_all_dim")?,
                    ) {
                        (Some(mscale), Some(all_dim)) => {
                            yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
                        }
                        _ => yarn_mscale(factor, 1.0),
                    },
                };
                RopeScaling::Yarn {
                    factor,
                    attention_factor,
                    beta_fast: numbers.optional("beta_fast")?.unwrap_or(32.0),
                    beta_slow: numbers.optional("beta_slow")?.unwrap_or(1.0),
                    truncate: parameters
                        .get("truncate")
                        .and_then(Value::as_bool)
                        .unwrap_or(true),
                    original_max_positions,
                }
            }
            other => {
                return Err(ConfigError::Unsupported {
                    field,
                    found: other.unwrap_or("a type that is not text").to_owned(),
                    reason: "rope types default, linear, llama3 and yarn are implemented",
                });
            }
        };
        Ok(Self { theta, scaling })
    }

    /// Frequencies in radians per position, one for each pair of dimensions
    /// `(i, i + head_dim / 2)`, and the factor on cos and sin.
    pub fn frequencies(&self, head_dim: usize) -> Frequencies {
        #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
        let powers: Vec<f32> = (0..head_dim)
            .step_by(2)
            .map(|index| narrow(self.theta).powf(index as f32 / head_dim as f32))
            .collect();
        let inverse = powers.iter().map(|power| 1.0 / power);
        let mut attention_factor = 1.0;
        let radians = match self.scaling {
            RopeScaling::None => inverse.collect(),
            RopeScaling::Linear { factor } => inverse.map(|freq| freq / narrow(factor)).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_positions,
            } => {
                let long = narrow(original_max_positions / low_freq_factor);
                let short = narrow(original_max_positions / high_freq_factor);
                let span = narrow(high_freq_factor - low_freq_factor);
                inverse
                    .map(|freq| {
                        let wavelength = narrow(2.0 * PI) / freq;
                        if wavelength > long {
                            freq / narrow(factor)
                        } else if wavelength < short {
                            freq
                        } else {
                            let smooth = (narrow(original_max_positions) / wavelength
                                - narrow(low_freq_factor))
                                / span;
                            (1.0 - smooth) * freq / narrow(factor) + smooth * freq
                        }
                    })
                    .collect()
            }
            RopeScaling::Yarn {
                factor,
                attention_factor: on_cos_and_sin,
                beta_fast,
                beta_slow,
                truncate,
                original_max_positions,
            } => {
                attention_factor = narrow(on_cos_and_sin);
                #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
                let dim = head_dim as f64;
                let dimension_of = |rotations: f64| {
                    dim * (original_max_positions / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                powers
                    .iter()
                    .enumerate()
                    .map(|(index, power)| {
                        #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
                        let ramp =
                            ((index as f32 - narrow(low)) / narrow(high - low)).clamp(0.0, 1.0);
                        let extrapolated = 1.0 - ramp;
                        1.0 / (narrow(factor) * power) * (1.0 - extrapolated)
                            + 1.0 / power * extrapolated
                    })
                    .collect()
            }
        };
        Frequencies {
            radians,
            attention_factor,
        }
    }

    /// Text that differs whenever two descriptions rotate differently.
    pub fn canonical(&self) -> String {
        let bits = |value: f64| format!("{:016x}", value.to_bits());
        let theta = bits(self.theta);
        match self.scaling {
            RopeScaling::None => format!("default(theta={theta})"),
            RopeScaling::Linear { factor } => {
                format!("linear(theta={theta},factor={})", bits(factor))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_positions,
            } => format!(
                "llama3(theta={theta},factor={},low={},high={},original={})",
                bits(factor),
                bits(low_freq_factor),
                bits(high_freq_factor),
                bits(original_max_positions)
            ),
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_positions,
            } => format!(
                "yarn(theta={theta},factor={},attention={},fast={},slow={},truncate={truncate},original={})",
                bits(factor),
                bits(attention_factor),
                bits(beta_fast),
                bits(beta_slow),
                bits(original_max_positions)
            ),
        }
    }
}

/// What [`RopeConfig::frequencies`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians per position; `head_dim / 2` of them.
    pub radians: Vec<f32>,
    /// Multiplies cos and sin; 1 except for yarn.
    pub attention_factor: f32,
}

impl Frequencies {
    /// Writes cos and sin of the angles at `position`; both `head_dim / 2` long.
    ///
    /// The angle is rounded to f32 before its cosine is taken, as transformers
    /// does; it matters from a few thousand positions on.
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        #[expect(clippy::cast_precision_loss, reason = "positions are at most 2^24")]
        let position = position as f32;
        for ((cos, sin), radians) in cos.iter_mut().zip(sin).zip(&self.radians) {
            let (s, c) = f64::from(position * radians).sin_cos();
            *cos = narrow(c) * self.attention_factor;
            *sin = narrow(s) * self.attention_factor;
        }
    }

    /// Writes cos and sin of the rotation that takes a key from position `from`
    /// to position `to`; both `head_dim / 2` long.
    ///
    /// Rotations compose, so a key rotated once more by these is what
    /// [`Self::angles`] at `to` would have made of it, up to rounding. The
    /// difference is taken of the rounded angles: a key keeps no error of the
    /// angle of its old position. The factor on cos and sin is in the key already.
    pub fn shift(&self, from: usize, to: usize, cos: &mut [f32], sin: &mut [f32]) {
        #[expect(clippy::cast_precision_loss, reason = "positions are at most 2^24")]
        let (from, to) = (from as f32, to as f32);
        for ((cos, sin), radians) in cos.iter_mut().zip(sin).zip(&self.radians) {
            let (s, c) = (f64::from(to * radians) - f64::from(from * radians)).sin_cos();
            *cos = narrow(c);
            *sin = narrow(s);
        }
    }
}

/// Rounds to f32, as torch does with Python floats.
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
pub(crate) fn narrow(value: f64) -> f32 {
    value as f32
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

struct Numbers<'a> {
    field: &'static str,
    parameters: &'a Map<String, Value>,
}

impl Numbers<'_> {
    /// A positive number; null and zero count as absent, as in transformers.
    fn optional(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.parameters.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(0.0) => Ok(None),
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => Err(ConfigError::Invalid {
                    field: self.field,
                    expected: "built from positive numbers",
                }),
            },
        }
    }

    fn required(&self, key: &'static str) -> Result<f64, ConfigError> {
        self.optional(key)?
            .ok_or(ConfigError::Missing { field: key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(config: &str) -> Result<RopeConfig, ConfigError> {
        RopeConfig::from_json(&serde_json::from_str(config).unwrap(), 32_768)
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let old = rope(r#"{"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}"#);
        let new = rope(
            r#"{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}"#,
        );
        assert_eq!(old.unwrap(), new.unwrap());
    }

    #[test]
    fn yarn_derives_its_attention_factor() {
        let config = rope(
            r#"{"rope_theta": 1e6, "rope_scaling":
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}"#,
        )
        .unwrap();
        let frequencies = config.frequencies(128);
        assert!((frequencies.attention_factor - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
        // The fastest dimension is kept, the slowest is interpolated fully.
        assert_eq!(frequencies.radians[0], 1.0);
        let slowest = 1.0 / 1e6f32.powf(126.0 / 128.0);
        assert!((frequencies.radians[63] * 4.0 / slowest - 1.0).abs() < 1e-5);
    }

    #[test]
    fn a_shifted_key_is_as_if_rotated_there() {
        for config in [
            r#"{"rope_theta": 1e4}"#,
            r#"{"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}"#,
            r#"{"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}}"#,
            r#"{"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                "original_max_position_embeddings": 8192}}"#,
        ] {
            let frequencies = rope(config).unwrap().frequencies(64);
            let isa = crate::kernels::Isa::detect();
            let key: Vec<f32> = (0u8..64).map(|i| f32::from(i).sin()).collect();
            let (mut cos, mut sin) = ([0.0; 32], [0.0; 32]);
            for (from, to) in [(0, 1), (1, 30_001), (17, 5), (32_000, 0), (900, 900)] {
                let mut rotated_at = |position| {
                    let mut key = key.clone();
                    frequencies.angles(position, &mut cos, &mut sin);
                    crate::kernels::rotate(isa, &mut key, &cos, &sin);
                    key
                };
                let (mut moved, expected) = (rotated_at(from), rotated_at(to));
                frequencies.shift(from, to, &mut cos, &mut sin);
                crate::kernels::rotate(isa, &mut moved, &cos, &sin);
                for (moved, expected) in moved.iter().zip(&expected) {
                    assert!((moved - expected).abs() < 1e-6, "{config} {from} {to}");
                }
            }
        }
    }

    #[test]
    fn unknown_types_are_refused_by_name() {
        for kind in ["dynamic", "longrope", "mrope"] {
            let error = rope(&format!(r#"{{"rope_scaling": {{"rope_type": "{kind}"}}}}"#));
            let text = error.unwrap_err().to_string();
            assert!(
                text.contains("rope_scaling") && text.contains(kind),
                "{text}"
            );
        }
    }
}
