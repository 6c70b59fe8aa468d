//! Token strings by id, and every list of `corpus.json` as ids.

use std::collections::HashMap;

use super::builder::MIN_FILLER;
use super::question::Question;
use super::spec::{AttributeSpec, Spec, Task};
use super::template::{Part, Slot, Template};

/// The words of the corpus and what is built of them.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    tokens: Vec<String>,
    tasks: Vec<Task>,
    /// `<s>`: in front of a context.
    pub(crate) bos: u32,
    /// `</s>`: after an answer.
    pub(crate) eos: u32,
    pub(super) doc: u32,
    question: u32,
    answer: u32,
    pub(super) numbers: Vec<u32>,
    pub(super) initials: Vec<u32>,
    pub(super) finals: Vec<u32>,
    pub(super) town_finals: Vec<u32>,
    pub(super) adjectives: Vec<u32>,
    pub(super) nouns: Vec<u32>,
    pub(super) ordinals: Vec<u32>,
    pub(super) roles: Vec<u32>,
    pub(super) relations: Vec<u32>,
    pub(super) attributes: Vec<Attribute>,
    pub(super) town_attributes: Vec<Attribute>,
    pub(super) relation_statements: Vec<Template>,
    pub(super) update: Vec<u32>,
    pub(super) alias: Template,
    pub(super) total: Vec<Template>,
    pub(super) needle: Vec<Template>,
    pub(super) pair: Template,
    pub(super) questions: Questions,
    pub(super) fillers: Vec<Vec<u32>>,
    /// `[length - MIN_FILLER]`: fillers of that length, in the order of the file.
    pub(super) fillers_by_length: Vec<Vec<Vec<u32>>>,
    /// `[gender][subject, possessive]`.
    pub(super) pronouns: [[u32; 2]; 2],
    pub(super) possessive: u32,
    pub(super) the: u32,
    pub(super) same: Vec<u32>,
    pub(super) that_town: Vec<u32>,
    /// Mottos are made of every attribute's value words.
    pub(super) motto_words: Vec<u32>,
}

/// Something that can be said of a person or a town.
#[derive(Debug)]
pub(super) struct Attribute {
    pub(super) name: u32,
    pub(super) values: Values,
    pub(super) statements: Vec<Template>,
}

/// Where the values of an attribute come from.
#[derive(Debug)]
pub(super) enum Values {
    Listed(Vec<u32>),
    /// A name of a town, made up.
    Town,
    /// Several words at random.
    Motto,
}

/// Templates of questions.
#[derive(Debug)]
pub(super) struct Questions {
    pub(super) attribute: Template,
    pub(super) hop2: Template,
    pub(super) town: Template,
    pub(super) needle: Template,
    pub(super) pair: Template,
    pub(super) ordinal: Template,
    pub(super) larger: Template,
    pub(super) smaller: Template,
}

impl Vocabulary {
    /// Reads the committed `corpus.json`.
    ///
    /// # Errors
    /// [`SpecError`] when the file was edited into something the generator cannot use.
    pub(crate) fn load() -> Result<Self, SpecError> {
        Self::parse(SPEC)
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Every evaluation task, in the order of the file.
    pub(crate) fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// The evaluation task of that name.
    pub(crate) fn task(&self, name: &str) -> Option<&Task> {
        self.tasks.iter().find(|task| task.name == name)
    }

    /// `<q> ... ? <a>`: what follows the context, up to the answer.
    pub(crate) fn prompt(&self, question: &Question) -> Vec<u32> {
        [&[self.question][..], &question.question, &[self.answer]].concat()
    }

    /// The text that the shipped tokenizer turns into `tokens`. Ids outside the
    /// vocabulary give none.
    pub(crate) fn text(&self, tokens: &[u32]) -> String {
        let mut out = String::new();
        for word in tokens.iter().filter_map(|&id| self.tokens.get(id as usize)) {
            if let Some(end) = word.strip_prefix("##") {
                out += end;
            } else {
                if !out.is_empty() {
                    out.push(' ');
                }
                out += word;
            }
        }
        out
    }

    fn parse(json: &str) -> Result<Self, SpecError> {
        let spec: Spec = serde_json::from_str(json).map_err(SpecError::Json)?;
        if spec.version != VERSION {
            return Err(SpecError::Version(spec.version));
        }
        let words = Words::of(&spec)?;
        let [_pad, bos, eos, _unk, doc, question, answer] = words.all(&spec.special)?[..] else {
            return Err(SpecError::Empty("special"));
        };
        let attributes = words.attributes(&spec.attributes, PERSON_SLOTS)?;
        let town_attributes = words.attributes(&spec.town_attributes, TOWN_SLOTS)?;
        let motto_words: Vec<u32> = attributes
            .iter()
            .flat_map(|attribute| match &attribute.values {
                Values::Listed(values) => &values[..],
                Values::Town | Values::Motto => &[],
            })
            .copied()
            .collect();
        let fillers: Vec<Vec<u32>> = spec
            .fillers
            .iter()
            .map(|text| words.sentence(text))
            .collect::<Result<_, _>>()?;
        let roles = words.list("roles", &spec.roles)?;
        if roles.len() < ALIASES {
            return Err(SpecError::Empty("roles"));
        }
        Ok(Self {
            bos,
            eos,
            doc,
            question,
            answer,
            numbers: words.list("numbers", &spec.numbers)?,
            initials: words.list("initials", &spec.initials)?,
            finals: words.list("finals", &spec.finals)?,
            town_finals: words.list("town_finals", &spec.town_finals)?,
            adjectives: words.list("adjectives", &spec.adjectives)?,
            nouns: words.list("nouns", &spec.nouns)?,
            ordinals: words.list("ordinals", &spec.ordinals)?,
            roles,
            relations: words.list("relations", &spec.relations)?,
            attributes: filled("attributes", attributes)?,
            town_attributes: filled("town_attributes", town_attributes)?,
            relation_statements: words.templates(&spec.relation_statements, RELATION_SLOTS)?,
            update: words.sentence(&spec.update)?,
            alias: words.template(&spec.alias, &[Slot::Alias, Slot::Name])?,
            total: words.templates(&spec.total, &[Slot::Value])?,
            needle: words.templates(&spec.needle, &[Slot::Key, Slot::Value])?,
            pair: words.template(&spec.pair, &[Slot::Name, Slot::Value])?,
            questions: words.questions(&spec)?,
            fillers_by_length: by_length(&fillers)?,
            fillers,
            pronouns: [
                words.pair(&spec.pronouns.female)?,
                words.pair(&spec.pronouns.male)?,
            ],
            possessive: words.id(POSSESSIVE)?,
            the: words.id(THE)?,
            same: words.sentence(&spec.same)?,
            that_town: words.sentence(&spec.that_town)?,
            motto_words: filled("values", motto_words)?,
            tasks: spec.tasks,
            tokens: words.tokens,
        })
    }
}

/// Tokens in the order of their ids.
struct Words {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Words {
    /// Gives ids: the special tokens, the lists, the attributes, then every word of
    /// every template that is new.
    fn of(spec: &Spec) -> Result<Self, SpecError> {
        let mut words = Self {
            tokens: Vec::new(),
            ids: HashMap::new(),
        };
        let lists = [
            &spec.special[..],
            &spec.numbers,
            &spec.initials,
            &spec.finals,
            &spec.town_finals,
            &spec.adjectives,
            &spec.nouns,
            &spec.ordinals,
            &spec.roles,
            &spec.relations,
        ];
        for word in lists.into_iter().flatten() {
            words.add(word)?;
        }
        let attributes = || spec.attributes.iter().chain(&spec.town_attributes);
        for attribute in attributes() {
            words.add(&attribute.name)?;
            for word in &attribute.values {
                words.add(word)?;
            }
        }
        let question = &spec.question;
        let templates = attributes()
            .flat_map(|attribute| &attribute.statements)
            .chain(&spec.relation_statements)
            .chain([&spec.update, &spec.alias])
            .chain(&spec.total)
            .chain(&spec.needle)
            .chain([
                &spec.pair,
                &question.attribute,
                &question.hop2,
                &question.town,
                &question.needle,
                &question.pair,
                &question.ordinal,
                &question.larger,
                &question.smaller,
            ])
            .chain(&spec.fillers)
            .chain(&spec.pronouns.female)
            .chain(&spec.pronouns.male)
            .chain([&spec.same, &spec.that_town]);
        for word in templates
            .flat_map(|text| text.split_whitespace())
            .chain([POSSESSIVE, THE])
            .filter(|word| !word.starts_with('{'))
        {
            words.add(word)?;
        }
        Ok(words)
    }

    fn add(&mut self, word: &str) -> Result<(), SpecError> {
        if !self.ids.contains_key(word) {
            let id = u32::try_from(self.tokens.len()).map_err(|_| SpecError::TooManyWords)?;
            self.ids.insert(word.to_owned(), id);
            self.tokens.push(word.to_owned());
        }
        Ok(())
    }

    fn id(&self, word: &str) -> Result<u32, SpecError> {
        let unknown = || SpecError::Unknown { word: word.into() };
        self.ids.get(word).copied().ok_or_else(unknown)
    }

    fn all(&self, words: &[String]) -> Result<Vec<u32>, SpecError> {
        words.iter().map(|word| self.id(word)).collect()
    }

    fn list(&self, name: &'static str, words: &[String]) -> Result<Vec<u32>, SpecError> {
        filled(name, self.all(words)?)
    }

    fn pair(&self, [a, b]: &[String; 2]) -> Result<[u32; 2], SpecError> {
        Ok([self.id(a)?, self.id(b)?])
    }

    /// A text without slots.
    fn sentence(&self, text: &str) -> Result<Vec<u32>, SpecError> {
        Ok(self.template(text, &[])?.fill(&[]))
    }

    fn template(&self, text: &str, slots: &[Slot]) -> Result<Template, SpecError> {
        let slot = || SpecError::Slot { text: text.into() };
        let part = |word: &str| match word.strip_prefix('{') {
            Some(rest) => {
                let letter = rest.strip_suffix('}').ok_or_else(slot)?;
                Slot::parse(letter).map(Part::Slot).ok_or_else(slot)
            }
            None => Ok(Part::Token(self.id(word)?)),
        };
        let parts = text
            .split_whitespace()
            .map(part)
            .collect::<Result<_, _>>()?;
        Template::new(parts, slots).ok_or_else(slot)
    }

    fn templates(&self, texts: &[String], slots: &[Slot]) -> Result<Vec<Template>, SpecError> {
        let templates = texts.iter().map(|text| self.template(text, slots));
        filled("statements", templates.collect::<Result<_, _>>()?)
    }

    fn attributes(
        &self,
        specs: &[AttributeSpec],
        slots: &[Slot],
    ) -> Result<Vec<Attribute>, SpecError> {
        let attribute = |spec: &AttributeSpec| {
            Ok(Attribute {
                name: self.id(&spec.name)?,
                values: match &spec.values[..] {
                    [] if spec.name == "home" => Values::Town,
                    [] => Values::Motto,
                    values => Values::Listed(self.all(values)?),
                },
                statements: self.templates(&spec.statements, slots)?,
            })
        };
        specs.iter().map(attribute).collect()
    }

    fn questions(&self, spec: &Spec) -> Result<Questions, SpecError> {
        let Spec { question, .. } = spec;
        let named = &[Slot::Attribute, Slot::Name];
        let two = &[Slot::Ordinal, Slot::SecondOrdinal];
        Ok(Questions {
            attribute: self.template(&question.attribute, named)?,
            hop2: self.template(
                &question.hop2,
                &[Slot::Attribute, Slot::Relation, Slot::Name],
            )?,
            town: self.template(&question.town, named)?,
            needle: self.template(&question.needle, &[Slot::Key])?,
            pair: self.template(&question.pair, &[Slot::Name])?,
            ordinal: self.template(&question.ordinal, &[Slot::Ordinal])?,
            larger: self.template(&question.larger, two)?,
            smaller: self.template(&question.smaller, two)?,
        })
    }
}

/// Fillers of [`MIN_FILLER`] tokens and more; there is one of every length.
fn by_length(fillers: &[Vec<u32>]) -> Result<Vec<Vec<Vec<u32>>>, SpecError> {
    let longest = fillers.iter().map(Vec::len).max().unwrap_or(0);
    let groups: Vec<Vec<Vec<u32>>> = (MIN_FILLER..=longest)
        .map(|length| {
            let of_length = fillers.iter().filter(|filler| filler.len() == length);
            of_length.cloned().collect()
        })
        .collect();
    let grouped: usize = groups.iter().map(Vec::len).sum();
    if groups.is_empty() || groups.iter().any(Vec::is_empty) || grouped < fillers.len() {
        return Err(SpecError::Fillers);
    }
    Ok(groups)
}

fn filled<T>(name: &'static str, list: Vec<T>) -> Result<Vec<T>, SpecError> {
    if list.is_empty() {
        return Err(SpecError::Empty(name));
    }
    Ok(list)
}

/// Why `corpus.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// Not JSON, or not of the layout.
    #[error("corpus.json cannot be understood")]
    Json(#[source] serde_json::Error),
    /// Made for another generator.
    #[error("corpus.json has version {0}, not {VERSION}")]
    Version(u32),
    /// A list has too few items.
    #[error("corpus.json has too few {0}")]
    Empty(&'static str),
    /// A word that should be one token has no id.
    #[error("corpus.json lacks the word {word:?}")]
    Unknown {
        /// The word.
        word: String,
    },
    /// A template has a slot that nothing fills.
    #[error("corpus.json has a slot that is not known in {text:?}")]
    Slot {
        /// The template.
        text: String,
    },
    /// A chunk could not be filled to its last token.
    #[error("corpus.json needs fillers of {MIN_FILLER} tokens and of every length above")]
    Fillers,
    /// More words than ids.
    #[error("corpus.json has too many words")]
    TooManyWords,
}

/// Roles that may be given, from the first.
pub(super) const ALIASES: usize = 4;

const SPEC: &str = include_str!("../../quality/corpus.json");
const VERSION: u32 = 1;
const POSSESSIVE: &str = "'s";
const THE: &str = "The";
const PERSON_SLOTS: &[Slot] = &[Slot::Subject, Slot::Possessive, Slot::Value];
const TOWN_SLOTS: &[Slot] = &[Slot::Town, Slot::Value];
const RELATION_SLOTS: &[Slot] = &[Slot::Subject, Slot::Possessive, Slot::Relation, Slot::Other];
