//! Text to token ids and back, from the files of a Hugging Face checkpoint.
//!
//! | file | read for |
//! |---|---|
//! | `tokenizer.json` | everything about encoding and decoding; required |
//! | `tokenizer_config.json` | special tokens, `add_bos_token`, `chat_template` |
//! | `chat_template.jinja` | the template; goes before `tokenizer_config.json` |
//! | `generation_config.json` | further end-of-sequence ids |
//!
//! Not here: what a template says ([`crate::chat`]).

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use self::files::{GenerationConfig, TokenizerConfig};

pub use self::detokenize::Detokenizer;

mod detokenize;
mod files;

/// The tokenizer of one model.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    digest: [u8; 32],
    special_ids: BTreeSet<u32>,
    special_tokens: BTreeMap<String, String>,
    stop_tokens: Vec<u32>,
    bos: Bos,
    templates: BTreeMap<String, String>,
}

/// What `add_special` does about the beginning-of-sequence token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bos {
    /// What the post-processor of `tokenizer.json` does.
    AsProcessed,
    /// Put this id in front; the post-processor does not.
    Add(u32),
    /// Take this id away; the post-processor puts it there.
    Remove(u32),
}

impl Tokenizer {
    /// Reads the tokenizer files in `dir`.
    ///
    /// `config_eos` are the end-of-sequence ids of the model's `config.json`;
    /// [`Self::stop_tokens`] joins them with those of the other files.
    ///
    /// # Errors
    /// [`LoadError`] when `tokenizer.json` is absent, or a file that is there
    /// cannot be read or understood.
    pub fn load(dir: &Path, config_eos: &[u32]) -> Result<Self, LoadError> {
        let path = dir.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(|source| LoadError::Read {
            path: path.clone(),
            source,
        })?;
        let config: TokenizerConfig = read_json(dir, "tokenizer_config.json")?;
        let generation: GenerationConfig = read_json(dir, "generation_config.json")?;
        let template = read_optional(&dir.join("chat_template.jinja"))?;
        let mut tokenizer = Self::from_bytes(&bytes, config, template)
            .map_err(|source| LoadError::Tokenizer { path, source })?;
        let eos = tokenizer
            .special_tokens
            .get("eos_token")
            .and_then(|token| tokenizer.inner.token_to_id(token));
        let ids = config_eos
            .iter()
            .copied()
            .chain(generation.eos_token_id.ids())
            .chain(eos);
        tokenizer.stop_tokens = ids.collect::<BTreeSet<_>>().into_iter().collect();
        Ok(tokenizer)
    }

    fn from_bytes(
        bytes: &[u8],
        config: TokenizerConfig,
        template: Option<String>,
    ) -> Result<Self, tokenizers::Error> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
        // A prompt is never cut or filled up, whatever the file was saved with.
        inner.with_truncation(None)?;
        inner.with_padding(None);
        let special_ids = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        let special_tokens = config.special_tokens();
        let bos = match (config.add_bos_token, special_tokens.get("bos_token")) {
            (Some(wanted), Some(bos)) => Bos::choose(&inner, bos, wanted)?,
            _ => Bos::AsProcessed,
        };
        let mut templates = config.chat_template.named();
        if let Some(template) = template {
            templates.insert(DEFAULT_TEMPLATE.to_owned(), template);
        }
        Ok(Self {
            inner,
            digest: *blake3::hash(bytes).as_bytes(),
            special_ids,
            special_tokens,
            stop_tokens: Vec::new(),
            bos,
            templates,
        })
    }

    /// Token ids of `text`.
    ///
    /// Special tokens written out in `text` become their ids. `add_special`
    /// also adds those the tokenizer puts around a text (`bos`, mostly), as
    /// `tokenizer(text)` of transformers does; a rendered chat holds its own,
    /// so it is encoded without.
    ///
    /// # Errors
    /// [`EncodeError`] when the tokenizer's model has no token for a part of
    /// the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|source| EncodeError { source })?;
        let ids = encoding.get_ids();
        Ok(match self.bos {
            Bos::Add(bos) if add_special => [&[bos], ids].concat(),
            Bos::Remove(bos) if add_special => ids.strip_prefix(&[bos]).unwrap_or(ids).to_vec(),
            _ => ids.to_vec(),
        })
    }

    /// Text of `ids`; special tokens give none when `skip_special`.
    ///
    /// Ids outside the vocabulary give no text. Without a decoder in
    /// `tokenizer.json`, tokens are joined with spaces.
    ///
    /// # Errors
    /// [`DecodeError`] when the tokenizer's decoder rejects the tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DecodeError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|source| DecodeError { source })
    }

    /// Decodes a continuation of `prompt` token by token.
    ///
    /// The text starts as it does after the prompt, with a space if the
    /// tokenizer joins words by spaces. An empty `prompt` gives text that
    /// stands alone.
    ///
    /// # Errors
    /// [`DecodeError`] when the tokenizer's decoder rejects the prompt's end.
    pub fn detokenizer(self: &Arc<Self>, prompt: &[u32]) -> Result<Detokenizer, DecodeError> {
        Detokenizer::new(Arc::clone(self), prompt)
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Ids that end a sequence, ascending: those of the model's configuration,
    /// of `generation_config.json` and the tokenizer's `eos_token`.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Special tokens by their name in `tokenizer_config.json`, such as `bos_token`.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// Chat templates by name; the usual one is [`DEFAULT_TEMPLATE`].
    pub fn templates(&self) -> &BTreeMap<String, String> {
        &self.templates
    }

    /// BLAKE3 of `tokenizer.json`, as it enters chunk keys.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

impl Bos {
    /// Compares what the post-processor does with what the configuration wants.
    fn choose(
        inner: &tokenizers::Tokenizer,
        bos: &str,
        wanted: bool,
    ) -> Result<Self, tokenizers::Error> {
        let Some(bos) = inner.token_to_id(bos) else {
            return Ok(Self::AsProcessed);
        };
        let added = inner.encode_fast("", true)?.get_ids().first() == Some(&bos);
        Ok(match (wanted, added) {
            (true, false) => Self::Add(bos),
            (false, true) => Self::Remove(bos),
            _ => Self::AsProcessed,
        })
    }
}

/// Why a tokenizer could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be read; `tokenizer.json` must be there.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A configuration file is not the JSON it should be.
    #[error("cannot understand {}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// `tokenizer.json` is not a tokenizer this build supports.
    #[error("cannot load {}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library said.
        source: tokenizers::Error,
    },
}

/// A text has no tokens in this vocabulary.
#[derive(Debug, thiserror::Error)]
#[error("the text cannot be tokenised")]
pub struct EncodeError {
    source: tokenizers::Error,
}

/// Tokens have no text in this vocabulary.
#[derive(Debug, thiserror::Error)]
#[error("the tokens cannot be decoded")]
pub struct DecodeError {
    source: tokenizers::Error,
}

/// Name of the template that serves unless another one fits better.
pub const DEFAULT_TEMPLATE: &str = "default";

/// The file's contents, or the default when there is no such file.
fn read_json<T: DeserializeOwned + Default>(dir: &Path, name: &str) -> Result<T, LoadError> {
    let path = dir.join(name);
    match read_optional(&path)? {
        Some(text) => {
            serde_json::from_str(&text).map_err(|source| LoadError::Config { path, source })
        }
        None => Ok(T::default()),
    }
}

fn read_optional(path: &Path) -> Result<Option<String>, LoadError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests;
