//! CPU inference for Llama-family models, with an OpenAI-compatible face.

pub mod chat;
pub mod http;
pub mod metrics;
pub mod request;
pub mod sampling;
pub mod tokenizer;
