//! What a writer tells of a chunk beside its bytes, and what it is promised.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::key::ChunkKey;

/// What an acknowledged put promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The chunk can be read. A crash may lose it, and so may its eviction: it moves
    /// to disk only if that seems worth the write.
    Memory,
    /// The chunk survives a crash and a power cut. A store without a disk tier keeps
    /// it in memory, and says so.
    #[default]
    Durable,
}

/// What a chunk is worth, as far as its writer knows. Changes what is evicted first,
/// and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// The chunk before it in its prompt. Store that one first: a parent that is stored
    /// is not evicted before its children.
    pub parent: Option<ChunkKey>,
    /// The class of traffic it is charged to.
    pub class: Class,
    /// The cost of computing it again, as the number of tokens at the beginning of a
    /// prompt that cost as much. Default: its own tokens.
    pub recompute: Option<NonZeroU32>,
}

/// A class of traffic: agents, system prompts, batch jobs. Less than [`Self::LIMIT`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(try_from = "u8", into = "u8")]
pub struct Class(u8);

impl Class {
    /// Number of classes.
    pub const LIMIT: u8 = 16;

    /// `None` where there is no such class.
    pub const fn new(number: u8) -> Option<Self> {
        if number < Self::LIMIT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for Class {
    type Error = NoSuchClass;

    fn try_from(number: u8) -> Result<Self, NoSuchClass> {
        Self::new(number).ok_or(NoSuchClass(number.into()))
    }
}

impl TryFrom<u32> for Class {
    type Error = NoSuchClass;

    fn try_from(number: u32) -> Result<Self, NoSuchClass> {
        let narrow = u8::try_from(number).ok().and_then(Self::new);
        narrow.ok_or(NoSuchClass(number))
    }
}

impl From<Class> for u8 {
    fn from(class: Class) -> Self {
        class.0
    }
}

/// There are [`Class::LIMIT`] classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no class {0}; classes are 0 to {max}", max = Class::LIMIT - 1)]
pub struct NoSuchClass(u32);
