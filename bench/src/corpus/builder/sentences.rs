//! Sentences about persons, as far as the chunk has room for them.

use super::Builder;
use crate::corpus::question::Kind;
use crate::corpus::template::Slot;
use crate::corpus::vocabulary::{Attribute, Values};
use crate::corpus::world::{Fact, PersonIndex, Relation};

/// What stands for a person in a sentence.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) subject: Vec<u32>,
    pub(super) possessive: Vec<u32>,
}

impl Builder<'_> {
    /// The person's name.
    pub(super) fn named(&self, person: PersonIndex) -> Subject {
        self.called(&self.world.people[person].name.tokens)
    }

    /// The person's pronouns.
    pub(super) fn pronoun(&self, person: PersonIndex) -> Subject {
        let [subject, possessive] = self.vocabulary.pronouns[self.world.people[person].gender];
        Subject {
            subject: vec![subject],
            possessive: vec![possessive],
        }
    }

    /// Anything that takes a possessive `'s`.
    pub(super) fn called(&self, tokens: &[u32]) -> Subject {
        Subject {
            subject: tokens.to_vec(),
            possessive: [tokens, &[self.vocabulary.possessive]].concat(),
        }
    }

    /// States a new value of an attribute; `false` if there was no room.
    pub(super) fn state(
        &mut self,
        person: PersonIndex,
        index: usize,
        subject: &Subject,
        kind: Kind,
        prefix: &[u32],
    ) -> bool {
        let attribute = &self.vocabulary.attributes[index];
        let value = self.value(attribute);
        let statement = self.rng.pick(&attribute.statements).fill(&[
            (Slot::Subject, &subject.subject),
            (Slot::Possessive, &subject.possessive),
            (Slot::Value, &value),
        ]);
        if !self.add(&[prefix, &statement].concat()) {
            return false;
        }
        if matches!(attribute.values, Values::Town) {
            self.last_town = Some(self.world.town(&value));
        }
        let chunk = self.index();
        let fact = Fact { value, kind, chunk };
        self.world.people[person].facts.insert(index, fact);
        true
    }

    /// States up to `count` new facts, the first of them about `opening`; `false` if none.
    pub(super) fn facts(
        &mut self,
        person: PersonIndex,
        count: u32,
        opening: &Subject,
        kind: Kind,
    ) -> bool {
        let mut opened = false;
        let open = self.open_attributes(person);
        for index in open.into_iter().take(count as usize) {
            let subject = if !opened {
                opening.clone()
            } else if kind == Kind::Hop1 && self.rng.chance(self.profile.name_again) {
                self.named(person)
            } else {
                self.pronoun(person)
            };
            opened |= self.state(person, index, &subject, kind, &[]);
            self.maybe_filler();
        }
        opened
    }

    /// Attributes of this context that nothing was said about, in random order.
    pub(super) fn open_attributes(&mut self, person: PersonIndex) -> Vec<usize> {
        let facts = &self.world.people[person].facts;
        let pool = self.pool.iter().copied();
        let mut open: Vec<usize> = pool.filter(|index| !facts.contains_key(index)).collect();
        self.rng.shuffle(&mut open);
        open
    }

    /// May state a relation to another person.
    pub(super) fn relate(&mut self, person: PersonIndex, kind: Kind) {
        let people = &self.world.people;
        let others: Vec<PersonIndex> = (0..people.len()).filter(|&other| other != person).collect();
        let relations = self.vocabulary.relations.iter().copied();
        let known = &people[person].relations;
        let open: Vec<u32> = relations.filter(|id| !known.contains_key(id)).collect();
        if others.is_empty() || open.is_empty() || !self.rng.chance(self.profile.relation) {
            return;
        }
        let relation = *self.rng.pick(&open);
        let other = *self.rng.pick(&others);
        let subject = self.pronoun(person);
        let statements = &self.vocabulary.relation_statements;
        let sentence = self.rng.pick(statements).fill(&[
            (Slot::Subject, &subject.subject),
            (Slot::Possessive, &subject.possessive),
            (Slot::Relation, &[relation]),
            (Slot::Other, &self.world.people[other].name.tokens),
        ]);
        if self.add(&sentence) {
            let chunk = self.index();
            let stated = Relation { other, kind, chunk };
            let relations = &mut self.world.people[person].relations;
            relations.insert(relation, stated);
        }
    }

    /// A value at random.
    pub(super) fn value(&mut self, attribute: &Attribute) -> Vec<u32> {
        let Self {
            vocabulary, rng, ..
        } = self;
        match &attribute.values {
            Values::Listed(values) => vec![*rng.pick(values)],
            Values::Town => vec![
                *rng.pick(&vocabulary.initials),
                *rng.pick(&vocabulary.town_finals),
            ],
            Values::Motto => {
                let words = rng.between(4, 7);
                (0..words)
                    .map(|_| *rng.pick(&vocabulary.motto_words))
                    .collect()
            }
        }
    }
}
