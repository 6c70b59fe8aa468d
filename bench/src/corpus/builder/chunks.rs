//! What each kind of chunk says.

use std::collections::BTreeMap;

use super::Builder;
use crate::corpus::SampleError;
use crate::corpus::question::Kind;
use crate::corpus::template::Slot;
use crate::corpus::vocabulary::ALIASES;
use crate::corpus::world::{Fact, Needle, Person};

impl Builder<'_> {
    /// New persons, named at the first fact.
    pub(super) fn persons(&mut self) -> Result<(), SampleError> {
        self.subject = None;
        let limit = match self.profile.persons {
            0 => 1 + self.size / TOKENS_PER_PERSON,
            persons => persons as usize,
        };
        for _ in 0..limit {
            if self.left() < PERSON_ROOM {
                break;
            }
            let people = &self.world.people;
            let name = self
                .names
                .draw(self.vocabulary, self.profile, people, self.rng)?;
            let person = people.len();
            self.world.people.push(Person {
                name,
                gender: self.rng.index(2),
                facts: BTreeMap::new(),
                relations: BTreeMap::new(),
            });
            let count = self.fact_count();
            if self.facts(person, count, &self.named(person), Kind::Hop1) {
                self.subject = Some(person);
                self.relate(person, Kind::Hop1);
            } else {
                self.world.people.pop();
            }
        }
        Ok(())
    }

    /// More about the person of the chunk before, who is not named.
    pub(super) fn continuation(&mut self, link: u32) {
        if self.last_town.is_some() && self.rng.chance(self.profile.town) {
            self.town_facts();
        }
        let Some(person) = self.subject else {
            return;
        };
        let opening = if self.rng.chance(400) {
            self.called(&self.vocabulary.same)
        } else {
            self.pronoun(person)
        };
        let kind = Kind::coref(link);
        let count = self.fact_count();
        if self.facts(person, count, &opening, kind) {
            self.relate(person, kind);
        }
    }

    /// "That town": the last one named before this chunk.
    fn town_facts(&mut self) {
        let Some(town) = self.last_town else {
            return;
        };
        let attributes = &self.vocabulary.town_attributes;
        let known = &self.world.towns[town].facts;
        let open: Vec<usize> = (0..attributes.len())
            .filter(|index| !known.contains_key(index))
            .collect();
        if open.is_empty() {
            return;
        }
        let index = *self.rng.pick(&open);
        let attribute = &attributes[index];
        let value = self.value(attribute);
        let sentence = self.rng.pick(&attribute.statements).fill(&[
            (Slot::Town, &self.vocabulary.that_town),
            (Slot::Value, &value),
        ]);
        if self.add(&sentence) {
            let (kind, chunk) = (Kind::Coref2, self.index());
            let fact = Fact { value, kind, chunk };
            self.world.towns[town].facts.insert(index, fact);
        }
    }

    /// Gives a person a role, which may have been another's.
    pub(super) fn alias(&mut self) {
        let role = *self.rng.pick(&self.vocabulary.roles[..ALIASES]);
        let person = self.rng.index(self.world.people.len());
        let sentence = self.vocabulary.alias.fill(&[
            (Slot::Alias, &[role]),
            (Slot::Name, &self.world.people[person].name.tokens),
        ]);
        if self.add(&sentence) {
            self.world.meanings.insert(role, person);
        }
    }

    /// Facts of persons who are only called by a role defined before.
    pub(super) fn roles(&mut self) {
        let meanings = &self.world.meanings;
        let known = self.vocabulary.roles.iter().copied();
        let mut roles: Vec<u32> = known.filter(|role| meanings.contains_key(role)).collect();
        self.rng.shuffle(&mut roles);
        for role in roles.into_iter().take(2) {
            let person = self.world.meanings[&role];
            let subject = self.called(&[self.vocabulary.the, role]);
            for index in self.open_attributes(person).into_iter().take(2) {
                self.state(person, index, &subject, Kind::Override, &[]);
            }
            self.maybe_filler();
        }
    }

    /// New values for facts stated under the person's name.
    pub(super) fn updates(&mut self) {
        for _ in 0..=self.size / TOKENS_PER_UPDATE {
            let person = self.rng.index(self.world.people.len());
            let facts = self.world.people[person].facts.iter();
            let known: Vec<usize> = facts
                .filter(|(_, fact)| fact.kind == Kind::Hop1)
                .map(|(&index, _)| index)
                .collect();
            if !known.is_empty() {
                let index = *self.rng.pick(&known);
                let subject = self.named(person);
                let prefix = &self.vocabulary.update;
                self.state(person, index, &subject, Kind::Update, prefix);
            }
        }
    }

    /// Things and their codes, to the end of the chunk.
    pub(super) fn needles(&mut self) {
        let vocabulary = self.vocabulary;
        while self.left() >= NEEDLE_ROOM {
            let key = [
                *self.rng.pick(&vocabulary.adjectives),
                *self.rng.pick(&vocabulary.nouns),
            ];
            let code = [
                *self.rng.pick(&vocabulary.numbers),
                *self.rng.pick(&vocabulary.numbers),
            ];
            if self.world.needles.iter().all(|needle| needle.key != key) {
                let template = self.rng.pick(&vocabulary.needle);
                let sentence = template.fill(&[(Slot::Key, &key), (Slot::Value, &code)]);
                if self.add(&sentence) {
                    let chunk = self.index();
                    self.world.needles.push(Needle { key, code, chunk });
                }
            }
            self.maybe_filler();
        }
    }

    /// The chunk's total.
    pub(super) fn total(&mut self) {
        let value = *self.rng.pick(&self.vocabulary.numbers);
        let template = self.rng.pick(&self.vocabulary.total);
        if self.add(&template.fill(&[(Slot::Value, &[value])])) {
            self.world.totals.push((self.index(), value));
        }
    }

    fn fact_count(&mut self) -> u32 {
        self.rng
            .between(self.profile.facts_min, self.profile.facts_max)
    }
}

/// A chunk has one person, and one more for so many tokens.
const TOKENS_PER_PERSON: usize = 56;

/// Tokens that a person needs: a name, a motto of seven words and the words around it.
const PERSON_ROOM: usize = 14;

/// A chunk of updates has one, and one more for so many tokens.
const TOKENS_PER_UPDATE: usize = 24;

/// Tokens that a needle needs, and a filler after it.
const NEEDLE_ROOM: usize = 16;
