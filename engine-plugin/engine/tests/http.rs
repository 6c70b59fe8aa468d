//! The HTTP front on a real socket, over an engine that plays a script.

#![expect(clippy::unwrap_used, reason = "a failure fails the test")]

mod script;

use std::time::Duration;

use kvasir_engine::PagingError;
use kvasir_engine::request::{FinishReason, RequestError};
use reqwest::StatusCode;
use script::{Play, Server, chat_ids, tokens};
use serde_json::{Value, json};

#[tokio::test]
async fn completion_is_openais() {
    let server = Server::start(Play::text(" world!")).await;
    let body = json!({"model": "tiny", "prompt": "Hello", "seed": 5, "top_k": 3,
        "temperature": 0.5, "top_p": 0.9, "unknown": {"is": "ignored"}});
    let (status, answer) = server.post("/v1/completions", &body).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["model"], "tiny");
    let choice = json!([
        {"index": 0, "text": " world!", "finish_reason": "stop", "logprobs": null}]);
    assert_eq!(answer["choices"], choice);
    let prompt = tokens("Hello", true);
    // The stop token counts although it has no text.
    let generated = tokens(" world!", false).len() + 1;
    let usage = json!({
        "prompt_tokens": prompt.len(), "completion_tokens": generated,
        "total_tokens": prompt.len() + generated, "prompt_tokens_details": {"cached_tokens": 3}});
    assert_eq!(answer["usage"], usage);
    let kvasir = json!({"cached_tokens": 3, "blended_tokens": 2, "recomputed": 0.5, "fetched_bytes": 1000,
            "cached_level": "l1", "ttft_ms": 250.0});
    assert_eq!(answer["kvasir"], kvasir);

    let request = server.requests().remove(0);
    assert_eq!(request.prompt, prompt);
    assert_eq!(request.max_tokens, 16);
    assert_eq!(request.stop_tokens, [2]);
    assert!(request.read_cache && request.write_cache && !request.logits_digest);
    assert_eq!(request.sampling.seed(), Some(5));
    assert_eq!(request.sampling.top_k(), Some(3));
    assert_eq!(request.sampling.temperature(), 0.5);
    assert_eq!(request.sampling.top_p(), 0.9);
}

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let server = Server::start(Play::text("ok")).await;
    let hello = tokens("Hello", true);
    let forms = [
        (json!("Hello"), vec![hello.clone()]),
        (json!(["Hello", "Hello"]), vec![hello.clone(), hello]),
        (json!([5, 6, 7]), vec![vec![5, 6, 7]]),
        (json!([[5, 6], [7]]), vec![vec![5, 6], vec![7]]),
    ];
    for (prompt, expected) in forms {
        let body = json!({"prompt": prompt});
        let (status, answer) = server.post("/v1/completions", &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let seen: Vec<Vec<u32>> = server.requests().into_iter().map(|r| r.prompt).collect();
        assert_eq!(seen, expected);
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), expected.len());
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], "ok");
        }
    }
}

/// Named in a field, behind the canonical prefix, or separated in the prompt.
#[tokio::test]
async fn chunks_come_in_two_forms() {
    let server = Server::start(Play::text("ok")).await;
    let of = |text: &str| tokens(text, false);
    let (hello, world) = (of("Hello"), of(" world!"));
    let ask = async |body: Value| {
        let (status, answer) = server.post("/v1/completions", &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let request = server.requests().remove(0);
        (request.prompt, request.chunks)
    };
    let found = ask(json!({"chunks": ["Hello", " world!"], "prompt": "Hello"})).await;
    let prompt = [&[1, 2], &hello[..], &world, &hello].concat();
    let first = 2..2 + hello.len();
    let second = first.end..first.end + world.len();
    assert_eq!(found, (prompt, vec![first, second]));

    let found = ask(json!({"prompt": "Hello # #  world! # # Hello"})).await;
    let before = tokens("Hello", true);
    let chunk = before.len()..before.len() + world.len();
    assert_eq!(found, ([before, world, hello].concat(), vec![chunk]));

    let found = ask(json!({"prompt": "Hello"})).await;
    assert_eq!(found, (tokens("Hello", true), vec![]));

    for body in [
        json!({"chunks": ["Hello"], "prompt": [5, 6]}),
        json!({"chunks": [""], "prompt": "Hello"}),
        json!({"chunks": "Hello", "prompt": "Hello"}),
    ] {
        let (status, answer) = server.post("/v1/completions", &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["error"]["param"], "chunks");
    }
}

#[tokio::test]
async fn options_reach_the_engine() {
    let server = Server::start(Play::text("ok")).await;
    let body = json!({"prompt": "a", "max_tokens": 3, "ignore_eos": true, "stop_token_ids": [9],
        "temperature": 0, "top_k": -1, "seed": -1,
        "kvasir": {"read_cache": false, "write_cache": false, "logits_digest": true}});
    let (_, answer) = server.post("/v1/completions", &body).await;
    let request = server.requests().remove(0);
    assert_eq!(request.max_tokens, 3);
    assert_eq!(request.stop_tokens, [9]);
    assert!(!request.read_cache && !request.write_cache && request.logits_digest);
    assert!(request.sampling.is_greedy());
    assert_eq!(request.sampling.top_k(), None);
    assert_eq!(request.sampling.seed(), Some(u64::MAX));
    let digests = answer["kvasir"]["logits_digests"].as_array().unwrap();
    assert_eq!(digests.len(), request_tokens("ok"));
    assert_eq!(digests[0], "ab".repeat(32));
}

fn request_tokens(text: &str) -> usize {
    tokens(text, false).len() + 1
}

#[tokio::test]
async fn stream_is_the_whole_in_pieces() {
    let text = "Où est 今日は 🙂?";
    let server = Server::start(Play::text(text)).await;
    let body = json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.stream("/v1/completions", &body).await;
    let (last, pieces) = chunks.split_last().unwrap();
    assert!(pieces.len() > 3, "several pieces");
    assert_eq!(joined(pieces, "text"), text);
    for piece in pieces {
        assert_eq!(piece["id"], last["id"]);
        assert_eq!(piece["usage"], Value::Null);
        assert!(
            !piece["choices"][0]["text"]
                .as_str()
                .unwrap()
                .contains('\u{fffd}')
        );
    }
    let reasons: Vec<_> = pieces
        .iter()
        .map(|p| &p["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(
        reasons.iter().filter(|reason| reason.is_null()).count(),
        pieces.len() - 1
    );
    assert_eq!(*reasons[pieces.len() - 1], "stop");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], request_tokens(text));
    assert_eq!(last["kvasir"]["cached_tokens"], 3);

    let body = json!({"prompt": "a", "stream": true});
    let chunks = server.stream("/v1/completions", &body).await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    assert_eq!(joined(&chunks, "text"), text);
}

/// The field `name` of all first choices.
fn joined(chunks: &[Value], name: &str) -> String {
    let texts = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0][name].as_str());
    texts.collect()
}

#[tokio::test]
async fn streams_of_several_prompts_are_told_apart() {
    let server = Server::start(Play::text("one two")).await;
    let body = json!({"prompt": ["a", "b"], "stream": true});
    let chunks = server.stream("/v1/completions", &body).await;
    for index in [0, 1] {
        let mine = chunks
            .iter()
            .filter(|chunk| chunk["choices"][0]["index"] == index);
        let mine: Vec<Value> = mine.cloned().collect();
        assert_eq!(joined(&mine, "text"), "one two");
    }
}

#[tokio::test]
async fn length_is_a_finish_reason() {
    let play = Play::Tokens(tokens("Hello", false), FinishReason::Length);
    let server = Server::start(play).await;
    let (_, answer) = server
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["choices"][0]["text"], "Hello");
}

#[tokio::test]
async fn stop_string_across_tokens_ends_and_cancels() {
    // Tokens are shorter than the stop string, and the engine never ends.
    let server = Server::start(Play::Endless(tokens("weather today", false))).await;
    let whole = json!({"prompt": "a", "stop": ["nowhere", "todayweather"]});
    let (_, answer) = server.post("/v1/completions", &whole).await;
    assert_eq!(answer["choices"][0]["text"], "weather ");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["kvasir"]["cached_tokens"], 3);
    assert_eq!(answer["kvasir"]["fetched_bytes"], 1000);
    server.cancelled().await;

    let body = json!({"prompt": "a", "stop": "todayweather", "stream": true});
    let chunks = server.stream("/v1/completions", &body).await;
    assert_eq!(joined(&chunks, "text"), "weather ");
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "stop"
    );
    server.cancelled().await;
}

#[tokio::test]
async fn text_held_for_a_stop_string_is_not_lost() {
    let server = Server::start(Play::text("the store keeps")).await;
    let body = json!({"prompt": "a", "stop": "keeps two", "stream": true});
    let chunks = server.stream("/v1/completions", &body).await;
    assert_eq!(joined(&chunks, "text"), "the store keeps");
}

#[tokio::test]
async fn logprobs_are_of_the_chosen_tokens() {
    let server = Server::start(Play::text("Hello world and")).await;
    let body = json!({"prompt": "a", "logprobs": 1, "stop": " and"});
    let (_, answer) = server.post("/v1/completions", &body).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    let texts = logprobs["tokens"].as_array().unwrap();
    let texts: Vec<&str> = texts.iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(texts.concat(), "Hello world");
    let mut at = 0;
    for (text, offset) in texts
        .iter()
        .zip(logprobs["text_offset"].as_array().unwrap())
    {
        assert_eq!(*offset, at);
        at += text.chars().count();
    }
    let values = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(values.len(), texts.len());
    assert_eq!(values[0], -0.5);

    let body = json!({"messages": [{"role": "user", "content": "a"}], "logprobs": true,
        "stream": true});
    let chunks = server.stream("/v1/chat/completions", &body).await;
    let entries = chunks.iter().filter_map(|chunk| {
        chunk["choices"][0]["logprobs"]["content"]
            .as_array()
            .cloned()
    });
    let entries: Vec<Value> = entries.flatten().collect();
    let text: String = entries
        .iter()
        .map(|e| e["token"].as_str().unwrap())
        .collect();
    assert_eq!(text, "Hello world and");
    assert_eq!(
        entries[0]["bytes"],
        json!(entries[0]["token"].as_str().unwrap().as_bytes())
    );
}

#[tokio::test]
async fn chat_renders_and_answers() {
    let server = Server::start(Play::text("It is sunny.")).await;
    let text = "What is the weather today?";
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": text}]});
    let (status, answer) = server.post("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["object"], "chat.completion");
    let choice = json!([{"index": 0, "finish_reason": "stop", "logprobs": null,
        "message": {"role": "assistant", "content": "It is sunny."}}]);
    assert_eq!(answer["choices"], choice);
    let request = server.requests().remove(0);
    assert_eq!(request.prompt, chat_ids(text));
    assert_eq!(request.max_tokens, script::CHAT_TOKENS);

    let long = "weather ".repeat(script::CONTEXT / 5);
    let body = json!({"messages": [{"role": "user", "content": long}]});
    server.post("/v1/chat/completions", &body).await;
    let request = server.requests().remove(0);
    let left = script::CONTEXT - request.prompt.len();
    assert!(left < script::CHAT_TOKENS, "{left} tokens are left");
    assert_eq!(request.max_tokens, left);

    let parts = json!([{"type": "text", "text": "What is"}, {"type": "text", "text": "it?"}]);
    let body = json!({"messages": [{"role": "user", "content": parts}], "max_tokens": 9,
        "max_completion_tokens": 7});
    server.post("/v1/chat/completions", &body).await;
    let request = server.requests().remove(0);
    assert_eq!(request.prompt, chat_ids("What is\nit?"));
    assert_eq!(request.max_tokens, 7);
}

#[tokio::test]
async fn chat_streams_role_then_content_then_reason() {
    let server = Server::start(Play::text("It is sunny.")).await;
    let body = json!({"messages": [{"role": "user", "content": "a"}], "stream": true});
    let chunks = server.stream("/v1/chat/completions", &body).await;
    let delta = |chunk: &Value| chunk["choices"][0]["delta"].clone();
    assert_eq!(
        delta(&chunks[0]),
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    let (last, before) = chunks.split_last().unwrap();
    let text: String = before
        .iter()
        .map(|c| delta(c)["content"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(text, "It is sunny.");
    assert_eq!(delta(last), json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn bad_fields_are_named() {
    let server = Server::start(Play::text("ok")).await;
    let cases = [
        (json!({}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": [1.5]}), "prompt"),
        (json!({"prompt": vec!["a"; 65]}), "prompt"),
        (json!({"prompt": "a", "temperature": "hot"}), "temperature"),
        (json!({"prompt": "a", "temperature": -1}), "temperature"),
        (json!({"prompt": "a", "top_p": 0}), "top_p"),
        (json!({"prompt": "a", "top_k": -2}), "top_k"),
        (json!({"prompt": "a", "seed": 1.5}), "seed"),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
        (json!({"prompt": "a", "max_tokens": -1}), "max_tokens"),
        (json!({"prompt": "a", "n": 2}), "n"),
        (json!({"prompt": "a", "best_of": 2}), "best_of"),
        (json!({"prompt": "a", "echo": true}), "echo"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "logprobs": 6}), "logprobs"),
        (json!({"prompt": "a", "logit_bias": {"5": 1}}), "logit_bias"),
        (
            json!({"prompt": "a", "presence_penalty": 1}),
            "presence_penalty",
        ),
        (json!({"prompt": "a", "stop": [""]}), "stop"),
        (
            json!({"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}),
            "stop",
        ),
        (json!({"prompt": "a", "stop": 5}), "stop"),
        (
            json!({"prompt": "a", "stop_token_ids": vec![5; 65]}),
            "stop_token_ids",
        ),
        (json!({"prompt": "a", "stream": "yes"}), "stream"),
        (
            json!({"prompt": "a", "stream_options": {}}),
            "stream_options",
        ),
        (
            json!({"prompt": "a", "kvasir": {"read_cash": true}}),
            "kvasir",
        ),
        (
            json!({"prompt": ["a", "b"], "kvasir": {"logits_digest": true}}),
            "kvasir",
        ),
    ];
    for (body, param) in cases {
        let (status, answer) = server.post("/v1/completions", &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert!(answer["error"]["message"].is_string());
    }
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let mut top_logprobs = user(json!("a"));
    top_logprobs["top_logprobs"] = json!(2);
    let cases = [
        (json!({}), "messages"),
        (json!({"messages": "a"}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": ["a"]}), "messages"),
        (json!({"messages": [{"content": "a"}]}), "messages"),
        (user(Value::Null), "messages"),
        (
            user(json!([{"type": "image_url", "image_url": {}}])),
            "messages",
        ),
        (user(json!(5)), "messages"),
        (
            json!({"messages": [{"role": "system", "content": "a"}]}),
            "messages",
        ),
        (top_logprobs, "top_logprobs"),
    ];
    for (body, param) in cases {
        let (status, answer) = server.post("/v1/chat/completions", &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
    assert!(server.requests().is_empty(), "nothing reached the engine");
}

#[tokio::test]
async fn a_templates_own_words_reach_the_client() {
    let server = Server::start(Play::text("ok")).await;
    let body = json!({"messages": [{"role": "narrator", "content": "a"},
        {"role": "user", "content": "a"}]});
    let (status, answer) = server.post("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(answer["error"]["message"], "Unknown role: narrator");
}

#[tokio::test]
async fn bodies_and_routes() {
    let server = Server::start(Play::text("ok")).await;
    let (status, answer) = server.send("/v1/completions", "{not json".to_owned()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(answer["error"]["type"], "invalid_request_error");
    let (status, _) = server.send("/v1/completions", "[]".to_owned()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let long = json!({"prompt": "a".repeat(script::BODY_BYTES)}).to_string();
    let (status, answer) = server.send("/v1/completions", long).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
    assert!(answer["error"]["message"].is_string());

    let body = json!({"model": "large", "prompt": "a"});
    let (status, answer) = server.post("/v1/completions", &body).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(answer["error"]["code"], "model_not_found");
    assert_eq!(answer["error"]["param"], "model");
    let (status, answer) = server.post("/v1/nothing", &body).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(answer["error"]["message"].is_string());
    let (status, answer) = server.get("/v1/completions").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{answer}");

    let (status, models) = server.get("/v1/models").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["object"], "model");
}

#[tokio::test]
async fn refusals_have_their_status() {
    let (needed, limit) = (900, 100);
    let unknown = RequestError::UnknownToken {
        token: 9,
        vocabulary: 5,
    };
    let cases = [
        (RequestError::EmptyPrompt, 400, json!("prompt"), Value::Null),
        (unknown, 400, json!("prompt"), Value::Null),
        (
            RequestError::TooLong { needed, limit },
            400,
            json!("prompt"),
            json!("context_length_exceeded"),
        ),
        (
            RequestError::Overloaded { waiting: 9 },
            429,
            Value::Null,
            json!("rate_limit_exceeded"),
        ),
        (
            RequestError::ShuttingDown,
            503,
            Value::Null,
            json!("shutting_down"),
        ),
        (
            RequestError::Pages(PagingError::Full),
            503,
            Value::Null,
            json!("kv_pages"),
        ),
        (RequestError::NotFinite, 500, Value::Null, Value::Null),
        (RequestError::Internal, 500, Value::Null, Value::Null),
    ];
    for (error, status, param, code) in cases {
        for play in [Play::Refuse(error.clone()), Play::Fail(error.clone())] {
            let server = Server::start(play).await;
            let response = server
                .request("/v1/completions", json!({"prompt": "a"}).to_string())
                .await;
            assert_eq!(response.status(), status, "{error}");
            let retry = response.headers().get("retry-after").is_some();
            assert_eq!(retry, matches!(status, 429 | 503));
            let answer: Value = response.json().await.unwrap();
            assert_eq!(answer["error"]["message"], error.to_string());
            assert_eq!(answer["error"]["param"], param);
            assert_eq!(answer["error"]["code"], code);
        }
    }
    let server = Server::start(Play::Vanish).await;
    let (status, answer) = server
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(answer["error"]["type"], "server_error");
}

#[tokio::test]
async fn failure_in_a_stream_is_an_event() {
    let server = Server::start(Play::Fail(RequestError::NotFinite)).await;
    let body = json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.stream("/v1/completions", &body).await;
    assert_eq!(chunks.last().unwrap()["error"]["type"], "server_error");
}

#[tokio::test]
async fn clients_that_leave_cancel() {
    let server = Server::start(Play::Endless(tokens("weather", false))).await;
    for stream in [true, false] {
        let body = json!({"prompt": "a", "stream": stream, "max_tokens": 1000});
        let request = server.request("/v1/completions", body.to_string());
        if stream {
            let mut response = request.await;
            assert!(response.chunk().await.unwrap().is_some());
            drop(response);
        } else {
            let left = tokio::time::timeout(Duration::from_millis(300), request).await;
            assert!(left.is_err(), "the engine never ends");
        }
        server.cancelled().await;
    }
}

#[tokio::test]
async fn one_refused_prompt_cancels_the_others() {
    let server = Server::start(Play::EndlessThenRefuse(tokens("weather", false))).await;
    let (status, _) = server
        .post("/v1/completions", &json!({"prompt": ["a", "b"]}))
        .await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    server.cancelled().await;
}

#[tokio::test]
async fn health_tells_readiness() {
    let server = Server::start(Play::text("ok")).await;
    assert_eq!(server.get("/health").await.0, StatusCode::OK);
    server.set_ready(false);
    assert_eq!(
        server.get("/health").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let (status, answer) = server
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer["error"]["code"], "not_ready");
}

#[tokio::test]
async fn shutdown_answers_what_is_in_progress() {
    let server = Server::start(Play::Slow(tokens("the store keeps two spaces", false))).await;
    let body = json!({"prompt": "a", "stream": true});
    let mut response = server.request("/v1/completions", body.to_string()).await;
    let first = response.chunk().await.unwrap().unwrap();
    let task = server.shut_down();
    let mut text = String::from_utf8(first.to_vec()).unwrap();
    while let Some(chunk) = response.chunk().await.unwrap() {
        text += std::str::from_utf8(&chunk).unwrap();
    }
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let served = tokio::time::timeout(Duration::from_secs(5), task).await;
    served.expect("serve returns").unwrap().unwrap();
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let server = Server::start(Play::text("Hello world")).await;
    server
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    server.post("/v1/completions", &json!({"prompt": []})).await;
    let text = server.text("/metrics").await;
    // Other tests count into the same recorder, so only presence is certain.
    for line in [
        "kvasir_engine_requests_total{endpoint=\"completions\",status=\"200\"}",
        "kvasir_engine_requests_total{endpoint=\"completions\",status=\"400\"}",
        "kvasir_engine_sequences_total{reason=\"stop\"}",
        "kvasir_engine_prompt_tokens_total ",
        "kvasir_engine_completion_tokens_total ",
        "kvasir_engine_cached_tokens_total ",
        "kvasir_engine_ttft_seconds_bucket{le=\"0.005\"}",
        "kvasir_engine_tpot_seconds_count",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
}
