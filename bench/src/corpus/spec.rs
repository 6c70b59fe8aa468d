//! `corpus.json` as it is written: words, templates, evaluation tasks.

use serde::Deserialize;

use super::profile::Profile;
use super::question::Kind;

/// The file. Where a list adds tokens, its order is that of their ids.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Spec {
    pub(super) version: u32,
    pub(super) special: [String; 7],
    pub(super) initials: Vec<String>,
    pub(super) finals: Vec<String>,
    pub(super) town_finals: Vec<String>,
    pub(super) numbers: Vec<String>,
    pub(super) adjectives: Vec<String>,
    pub(super) nouns: Vec<String>,
    pub(super) ordinals: Vec<String>,
    pub(super) roles: Vec<String>,
    pub(super) relations: Vec<String>,
    pub(super) attributes: Vec<AttributeSpec>,
    pub(super) relation_statements: Vec<String>,
    pub(super) town_attributes: Vec<AttributeSpec>,
    pub(super) update: String,
    pub(super) alias: String,
    pub(super) total: Vec<String>,
    pub(super) needle: Vec<String>,
    pub(super) pair: String,
    pub(super) question: QuestionSpec,
    pub(super) fillers: Vec<String>,
    pub(super) pronouns: PronounSpec,
    pub(super) same: String,
    pub(super) that_town: String,
    pub(super) tasks: Vec<Task>,
}

/// Something that can be said of a person or a town.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AttributeSpec {
    pub(super) name: String,
    /// None when values are made up.
    pub(super) values: Vec<String>,
    pub(super) statements: Vec<String>,
}

/// Templates of questions, in the order in which their words get ids.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QuestionSpec {
    pub(super) attribute: String,
    pub(super) hop2: String,
    pub(super) town: String,
    pub(super) needle: String,
    pub(super) pair: String,
    pub(super) ordinal: String,
    pub(super) larger: String,
    pub(super) smaller: String,
}

/// Subject and possessive.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PronounSpec {
    pub(super) female: [String; 2],
    pub(super) male: [String; 2],
}

/// What an evaluation asks: kinds of questions, and contexts made for them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Task {
    /// As on the command line.
    pub(crate) name: String,
    /// Questions of these kinds count.
    pub(crate) kinds: Vec<Kind>,
    /// What contexts are like.
    pub(crate) profile: Profile,
    /// Whether contexts are key-value lists of as many pairs as fit.
    /// Default: false.
    #[serde(default)]
    pub(crate) fill: bool,
}
