//! Every question that a context answers.

use super::Builder;
use crate::corpus::question::{Kind, Question};
use crate::corpus::template::{Slot, Template};
use crate::corpus::vocabulary::{Values, Vocabulary};
use crate::corpus::world::{Fact, Person, World};

impl Builder<'_> {
    /// Questions about persons, towns, needles and totals, in this order.
    pub(super) fn ask(&mut self) -> Vec<Question> {
        let mut out = Vec::new();
        for person in &self.world.people {
            of_facts(self.vocabulary, person, &mut out);
            of_relations(self.vocabulary, &self.world, person, &mut out);
        }
        let forms = &self.vocabulary.questions;
        for town in &self.world.towns {
            for (&index, fact) in &town.facts {
                let attribute = self.vocabulary.town_attributes[index].name;
                let slots = [
                    (Slot::Attribute, &[attribute][..]),
                    (Slot::Name, &town.name),
                ];
                out.push(of_fact(&forms.town, &slots, fact.kind, fact));
            }
        }
        for needle in &self.world.needles {
            out.push(Question {
                kind: Kind::Needle,
                question: forms.needle.fill(&[(Slot::Key, &needle.key)]),
                answer: needle.code.to_vec(),
                chunks: vec![needle.chunk],
            });
        }
        for &(chunk, value) in &self.world.totals {
            let ordinal = self.vocabulary.ordinals[chunk];
            out.push(Question {
                kind: Kind::Ordinal,
                question: forms.ordinal.fill(&[(Slot::Ordinal, &[ordinal])]),
                answer: vec![value],
                chunks: vec![chunk],
            });
        }
        self.compare(&mut out);
        out
    }

    /// As many comparisons as there are totals; those of equal totals are left out.
    fn compare(&mut self, out: &mut Vec<Question>) {
        let totals = &self.world.totals;
        if totals.len() < 2 {
            return;
        }
        let forms = &self.vocabulary.questions;
        for _ in 0..totals.len() {
            let (a, a_total) = *self.rng.pick(totals);
            let (b, b_total) = *self.rng.pick(totals);
            let larger = self.rng.chance(500);
            if a_total == b_total {
                continue;
            }
            // Tokens of numbers ascend with the numbers.
            let (form, answer) = if larger {
                (&forms.larger, a_total.max(b_total))
            } else {
                (&forms.smaller, a_total.min(b_total))
            };
            out.push(Question {
                kind: Kind::Compare,
                question: form.fill(&[
                    (Slot::Ordinal, &[self.vocabulary.ordinals[a]]),
                    (Slot::SecondOrdinal, &[self.vocabulary.ordinals[b]]),
                ]),
                answer: vec![answer],
                chunks: vec![a.min(b), a.max(b)],
            });
        }
    }
}

fn of_facts(vocabulary: &Vocabulary, person: &Person, out: &mut Vec<Question>) {
    for (&index, fact) in &person.facts {
        let attribute = &vocabulary.attributes[index];
        let kind = match attribute.values {
            Values::Motto => fact.kind.of_motto(),
            Values::Listed(_) | Values::Town => fact.kind,
        };
        let slots = [
            (Slot::Attribute, &[attribute.name][..]),
            (Slot::Name, &person.name.tokens),
        ];
        out.push(of_fact(&vocabulary.questions.attribute, &slots, kind, fact));
    }
}

/// Who somebody's relation is, and what else is known about the relation from
/// another chunk.
fn of_relations(vocabulary: &Vocabulary, world: &World, person: &Person, out: &mut Vec<Question>) {
    let forms = &vocabulary.questions;
    for (&relation, stated) in &person.relations {
        let other = &world.people[stated.other];
        out.push(Question {
            kind: stated.kind,
            question: forms.attribute.fill(&[
                (Slot::Attribute, &[relation]),
                (Slot::Name, &person.name.tokens),
            ]),
            answer: other.name.tokens.to_vec(),
            chunks: vec![stated.chunk],
        });
        if stated.kind != Kind::Hop1 {
            continue;
        }
        for (&index, fact) in &other.facts {
            let attribute = &vocabulary.attributes[index];
            let motto = matches!(attribute.values, Values::Motto);
            if fact.kind != Kind::Hop1 || fact.chunk == stated.chunk || motto {
                continue;
            }
            out.push(Question {
                kind: Kind::Hop2,
                question: forms.hop2.fill(&[
                    (Slot::Attribute, &[attribute.name]),
                    (Slot::Relation, &[relation]),
                    (Slot::Name, &person.name.tokens),
                ]),
                answer: fact.value.clone(),
                chunks: vec![stated.chunk, fact.chunk],
            });
        }
    }
}

fn of_fact(form: &Template, slots: &[(Slot, &[u32])], kind: Kind, fact: &Fact) -> Question {
    Question {
        kind,
        question: form.fill(slots),
        answer: fact.value.clone(),
        chunks: vec![fact.chunk],
    }
}
