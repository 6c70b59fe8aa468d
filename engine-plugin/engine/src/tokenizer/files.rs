//! The parts of `tokenizer_config.json` and `generation_config.json` that matter here.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::DEFAULT_TEMPLATE;

/// `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    pad_token: Option<Token>,
    unk_token: Option<Token>,
    pub(super) add_bos_token: Option<bool>,
    pub(super) chat_template: Templates,
}

impl TokenizerConfig {
    /// Special tokens that are set, by name.
    pub(super) fn special_tokens(&self) -> BTreeMap<String, String> {
        let named = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
            ("unk_token", &self.unk_token),
        ];
        named
            .into_iter()
            .filter_map(|(name, token)| Some((name.to_owned(), token.as_ref()?.text().to_owned())))
            .collect()
    }
}

/// A special token: its text, or an object around it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

/// `chat_template`: one, or a list of named ones.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
pub(super) enum Templates {
    #[default]
    None,
    One(String),
    Many(Vec<Named>),
}

impl Templates {
    /// Templates by name; a single one is the default one.
    pub(super) fn named(self) -> BTreeMap<String, String> {
        match self {
            Self::None => BTreeMap::new(),
            Self::One(template) => BTreeMap::from([(DEFAULT_TEMPLATE.to_owned(), template)]),
            Self::Many(list) => list.into_iter().map(|n| (n.name, n.template)).collect(),
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Named {
    name: String,
    template: String,
}

/// `generation_config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct GenerationConfig {
    pub(super) eos_token_id: Ids,
}

/// One id, several, or null.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    /// All of them.
    pub(super) fn ids(self) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}
