//! Messages to the prompt text a model was trained on.
//!
//! Checkpoints carry Jinja templates written for Python. They are rendered as
//! `apply_chat_template` of transformers does: blocks trimmed, nothing
//! escaped, Python's string methods, `raise_exception`, `strftime_now`,
//! `tojson` with Python's spacing, loop controls, and `generation` blocks
//! (which mark a model's own words for training) rendered as their content.
//!
//! What differs: `strftime_now` tells UTC, and lists and mappings print as
//! Jinja values rather than Python's `repr`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use minijinja::{Environment, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::tokenizer::DEFAULT_TEMPLATE;

mod python;

/// The chat templates of one model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// A list of mappings, each with at least `role` and `content`.
    pub messages: Value,
    /// Descriptions of tools; chooses the template named `tool_use` if there is one.
    pub tools: Option<Value>,
    /// Whether the prompt ends where the model is to speak.
    pub add_generation_prompt: bool,
    /// Further variables of this template, such as `enable_thinking`. They
    /// cannot replace the fields above.
    pub variables: BTreeMap<String, Value>,
}

impl ChatTemplate {
    /// Compiles `templates`, by name; templates see `special_tokens` by name.
    ///
    /// No template at all is fine until one is rendered.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] when a template is not valid Jinja.
    pub fn new(
        templates: &BTreeMap<String, String>,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(python::print);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", python::strftime_now);
        for (name, source) in templates {
            environment
                .add_template_owned(name.clone(), python::without_generation_blocks(source))
                .map_err(ChatError::Syntax)?;
        }
        Ok(Self {
            environment,
            special_tokens: special_tokens.clone(),
        })
    }

    /// The prompt text of a conversation. It holds its special tokens, so it
    /// is encoded without adding any.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] when the model has none,
    /// [`ChatError::Raised`] when the template rejects the messages,
    /// [`ChatError::Render`] when it fails on them.
    pub fn render(&self, conversation: &Conversation) -> Result<String, ChatError> {
        let with_tools = conversation.tools.as_ref().map(|_| TOOL_TEMPLATE);
        let template = with_tools
            .into_iter()
            .chain([DEFAULT_TEMPLATE])
            .find_map(|name| self.environment.get_template(name).ok())
            .ok_or(ChatError::NoTemplate)?;
        let tokens = self.special_tokens.iter();
        let mut context: BTreeMap<&str, Value> = tokens
            .map(|(name, token)| (name.as_str(), Value::from(token)))
            .collect();
        for (name, value) in &conversation.variables {
            context.insert(name, value.clone());
        }
        context.insert("messages", conversation.messages.clone());
        // None rather than undefined, as transformers passes them.
        let tools = conversation.tools.clone();
        context.insert("tools", tools.unwrap_or_else(|| Value::from(())));
        context
            .entry("documents")
            .or_insert_with(|| Value::from(()));
        context.insert(
            "add_generation_prompt",
            conversation.add_generation_prompt.into(),
        );
        template.render(context).map_err(ChatError::from_render)
    }
}

/// Why a conversation has no prompt text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The checkpoint has no chat template.
    #[error("this model has no chat template; use /v1/completions")]
    NoTemplate,
    /// A template is not valid Jinja.
    #[error("the chat template cannot be compiled")]
    Syntax(#[source] minijinja::Error),
    /// The template called `raise_exception`, with this message.
    #[error(transparent)]
    Raised(Raised),
    /// The template failed on these messages.
    #[error("the chat template cannot render these messages")]
    Render(#[source] minijinja::Error),
}

impl ChatError {
    fn from_render(error: minijinja::Error) -> Self {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(error) = cause {
            if let Some(raised) = error.downcast_ref::<Raised>() {
                return Self::Raised(raised.clone());
            }
            cause = error.source();
        }
        Self::Render(error)
    }
}

/// The message a template gave to `raise_exception`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Raised(pub String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
    Err(error.with_source(Raised(message)))
}

/// Name of the template that serves when tools are given.
const TOOL_TEMPLATE: &str = "tool_use";

#[cfg(test)]
mod tests;
