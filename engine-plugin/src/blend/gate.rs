//! Whether a model may be blended, and how: what was measured on it.
//!
//! Which repairs bring quality back differs from model to model, and no rule has a bound on its
//! error. So blending is off for a model until a check has measured it: its answers over reused
//! chunks, repaired in a few ways, beside those of full prefill. The verdict is a file in the
//! model's directory, [`Gate::FILE`], in JSON, and holds the numbers.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What a check found; see the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// [`Gate::VERSION`].
    pub version: u32,
    /// Digest of the weights that were measured, in hexadecimal.
    pub weights: String,
    /// Tokens that every chunk is compiled behind.
    pub prefix: Vec<u32>,
    /// Layers, from layer 1 on, whose deviation behind probes says which tokens are computed
    /// anew, and how deep.
    pub probe_layers: u16,
    /// The probes, in tokens.
    pub probes: Vec<Vec<u32>>,
    /// Questions asked.
    pub questions: u32,
    /// Of them, the share that full prefill answers as expected.
    pub full_exact: f64,
    /// The same where chunks are reused as they are.
    pub naive_exact: f64,
    /// Mean KL divergence of reuse as it is from full prefill, in nats a token of the answers.
    pub naive_kl: f64,
    /// What reuse as it is adds to the loss of text behind the chunks, in nats a token.
    pub naive_text: f64,
    /// What was tried, the cheapest first.
    pub repairs: Vec<Repair>,
}

/// One way to repair reused chunks, and how well it did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repair {
    /// Rows that may be computed for it, summed over layers, as a share of those of the
    /// reused tokens; see [`Rule::Graded`](super::Rule::Graded).
    pub budget: f32,
    /// Share of questions answered as expected.
    pub exact: f64,
    /// Mean KL divergence from full prefill, in nats a token.
    pub kl: f64,
    /// What it adds to the loss of text behind the chunks, in nats a token.
    pub text: f64,
}

/// How near to full prefill answers must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quality {
    /// As near as can be told: nothing is blended.
    Exact,
    /// The repair closes nine tenths of the gap between reuse as it is and full prefill.
    #[default]
    High,
    /// It closes seven tenths.
    Fair,
}

impl Quality {
    /// Share of the gap that must be closed.
    const fn closes(self) -> f64 {
        match self {
            Self::Exact => f64::INFINITY,
            Self::High => 0.9,
            Self::Fair => 0.7,
        }
    }
}

/// Exact answers that a repair may cost, whatever the gap is.
const EXACT_LOSS: f64 = 0.02;
/// KL below which reuse needs no repair: what an answer of a few tokens does not show.
const NO_GAP: f64 = 1e-3;
/// Fewest questions that say something.
const QUESTIONS: u32 = 100;

impl Gate {
    /// Name of the file in a model's directory.
    pub const FILE: &str = "kvasir-blend.json";
    /// Of the file's form.
    pub const VERSION: u32 = 1;

    /// Reads the verdict on the model in `directory`; `None` where there is none.
    ///
    /// # Errors
    /// The file cannot be read or makes no sense.
    pub fn load(directory: &Path) -> Result<Option<Self>, GateError> {
        let path = directory.join(Self::FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(GateError::Read { path, source }),
        };
        let gate: Self = serde_json::from_slice(&bytes).map_err(|source| GateError::Parse {
            path: path.clone(),
            source,
        })?;
        match gate.version {
            Self::VERSION => Ok(Some(gate)),
            version => Err(GateError::Version { path, version }),
        }
    }

    /// The repairs that are good enough, the cheapest first. None: the model is not blended.
    pub fn good(&self, quality: Quality) -> impl Iterator<Item = &Repair> {
        let few = self.questions < QUESTIONS;
        self.repairs.iter().filter(move |repair| {
            let exact = self.full_exact - repair.exact <= self.allowed_loss(quality);
            let near = repair.kl <= NO_GAP || self.closed(repair) >= quality.closes();
            !few && exact && near && quality != Quality::Exact
        })
    }

    /// The share of the gap in KL between reuse as it is and full prefill that a repair closes.
    pub fn closed(&self, repair: &Repair) -> f64 {
        if self.naive_kl > 0.0 {
            1.0 - repair.kl / self.naive_kl
        } else {
            1.0
        }
    }

    /// Exact answers that may be lost: of the gap, what need not be closed, but at least what
    /// chance may do to a few questions.
    fn allowed_loss(&self, quality: Quality) -> f64 {
        let gap = (self.full_exact - self.naive_exact).max(0.0);
        ((1.0 - quality.closes()) * gap).max(EXACT_LOSS)
    }
}

/// Why a verdict cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The file is there and cannot be read.
    #[error("{}: cannot be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// It is no verdict.
    #[error("{}: not a verdict on blending; check the model again", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// It was written by another version.
    #[error("{}: version {version} is not known; check the model again", .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(questions: u32, repairs: &[(f64, f64)]) -> Gate {
        Gate {
            version: Gate::VERSION,
            weights: String::new(),
            prefix: vec![1],
            probe_layers: 1,
            probes: vec![vec![5; 8]],
            questions,
            full_exact: 0.9,
            naive_exact: 0.5,
            naive_kl: 1.0,
            naive_text: 0.1,
            repairs: repairs
                .iter()
                .map(|&(exact, kl)| Repair {
                    budget: 0.08,
                    exact,
                    kl,
                    text: 0.0,
                })
                .collect(),
        }
    }

    fn good(gate: &Gate, quality: Quality) -> Vec<f64> {
        gate.good(quality).map(|repair| repair.kl).collect()
    }

    #[test]
    fn a_repair_is_good_when_it_closes_enough_of_both_gaps() {
        let gate = gate(500, &[(0.88, 0.4), (0.8, 0.25), (0.7, 0.2), (0.88, 0.05)]);
        assert_eq!(good(&gate, Quality::Fair), [0.25, 0.05]);
        assert_eq!(good(&gate, Quality::High), [0.05]);
        assert!(good(&gate, Quality::Exact).is_empty());
    }

    #[test]
    fn few_questions_prove_nothing() {
        assert!(good(&gate(20, &[(0.9, 0.0)]), Quality::Fair).is_empty());
    }

    #[test]
    fn a_file_is_read_back_and_a_damaged_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Gate::load(directory.path()).unwrap().is_none());
        let path = directory.path().join(Gate::FILE);
        let mut gate = gate(500, &[(0.9, 0.1)]);
        std::fs::write(&path, serde_json::to_vec(&gate).unwrap()).unwrap();
        assert_eq!(Gate::load(directory.path()).unwrap(), Some(gate.clone()));
        gate.version = 9;
        std::fs::write(&path, serde_json::to_vec(&gate).unwrap()).unwrap();
        let error = Gate::load(directory.path()).unwrap_err();
        assert!(matches!(error, GateError::Version { version: 9, .. }));
        std::fs::write(&path, b"{").unwrap();
        let error = Gate::load(directory.path()).unwrap_err();
        assert!(matches!(error, GateError::Parse { .. }));
    }
}
