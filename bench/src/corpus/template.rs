//! Sentences with slots.

/// What goes into a sentence; written `{S}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// `S`
    Subject,
    /// `P`
    Possessive,
    /// `V`
    Value,
    /// `R`
    Relation,
    /// `O`
    Other,
    /// `T`
    Town,
    /// `A`
    Alias,
    /// `N`
    Name,
    /// `K`
    Key,
    /// `X`
    Attribute,
    /// `D`
    Ordinal,
    /// `E`
    SecondOrdinal,
}

impl Slot {
    pub(super) fn parse(letter: &str) -> Option<Self> {
        Some(match letter {
            "S" => Self::Subject,
            "P" => Self::Possessive,
            "V" => Self::Value,
            "R" => Self::Relation,
            "O" => Self::Other,
            "T" => Self::Town,
            "A" => Self::Alias,
            "N" => Self::Name,
            "K" => Self::Key,
            "X" => Self::Attribute,
            "D" => Self::Ordinal,
            "E" => Self::SecondOrdinal,
            _ => return None,
        })
    }
}

/// One word of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Token(u32),
    Slot(Slot),
}

/// A sentence or question as token ids and slots.
#[derive(Clone, Debug)]
pub(super) struct Template {
    parts: Vec<Part>,
}

impl Template {
    /// `None` if a part is a slot other than `slots`.
    pub(super) fn new(parts: Vec<Part>, slots: &[Slot]) -> Option<Self> {
        let known = |part: &Part| match part {
            Part::Token(_) => true,
            Part::Slot(slot) => slots.contains(slot),
        };
        parts.iter().all(known).then_some(Self { parts })
    }

    /// The tokens, with every slot filled in; a slot without a filling gets none.
    pub(super) fn fill(&self, slots: &[(Slot, &[u32])]) -> Vec<u32> {
        let mut out = Vec::with_capacity(self.parts.len() + 8);
        for part in &self.parts {
            match part {
                Part::Token(token) => out.push(*token),
                Part::Slot(slot) => {
                    let filling = slots.iter().find(|(name, _)| name == slot);
                    out.extend(filling.iter().flat_map(|(_, tokens)| tokens.iter()));
                }
            }
        }
        out
    }
}
