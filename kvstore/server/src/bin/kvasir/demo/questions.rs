//! Documents and questions.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::Deserialize;

/// One question about one document.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Question {
    pub(super) document_id: String,
    pub(super) document: String,
    pub(super) question: String,
    /// What transformers answers with the same model.
    pub(super) reference: Option<String>,
}

impl Question {
    pub(super) fn prompt(&self) -> String {
        format!("{} {}", self.document, self.question)
    }
}

const SHIPPED: &str = "models/reader-9m/questions.jsonl";

/// Reads `file`, else the questions beside `model`, else the shipped documents, whose
/// reference answers say nothing about another model.
pub(super) fn load(file: Option<&Path>, model: &Path) -> anyhow::Result<Vec<Question>> {
    let beside = model.join("questions.jsonl");
    let (path, foreign) = match file {
        Some(file) => (file, false),
        None if beside.exists() => (beside.as_path(), false),
        None => (Path::new(SHIPPED), true),
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("reading questions from {}", path.display()))?;
    let mut questions = Vec::new();
    for (number, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let mut question: Question = serde_json::from_str(line)
            .with_context(|| format!("{}, line {}", path.display(), number + 1))?;
        if foreign {
            question.reference = None;
        }
        questions.push(question);
    }
    ensure!(
        !questions.is_empty(),
        "{} holds no questions",
        path.display()
    );
    Ok(questions)
}
