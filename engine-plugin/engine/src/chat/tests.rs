use super::*;
use std::path::Path;

use serde::Deserialize;

use crate::tokenizer::Tokenizer;

/// `expected.json` of a chat fixture, made by transformers.
#[derive(Deserialize)]
struct Expected {
    chat: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    messages: Value,
    variables: BTreeMap<String, Value>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    ids: Vec<u32>,
    error: Option<String>,
}

fn template(source: &str) -> ChatTemplate {
    let templates = BTreeMap::from([("default".to_owned(), source.to_owned())]);
    let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
    ChatTemplate::new(&templates, &tokens).unwrap()
}

fn conversation(messages: &str) -> Conversation {
    Conversation {
        messages: serde_json::from_str(messages).unwrap(),
        ..Conversation::default()
    }
}

/// `source` rendered with one user message.
fn rendered(source: &str) -> String {
    let one = conversation(r#"[{"role": "user", "content": "a<b"}]"#);
    template(source).render(&one).unwrap()
}

#[test]
fn agrees_with_transformers() {
    for name in ["chat-config", "chat-jinja"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures")
            .join(name);
        let expected = std::fs::read(dir.join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_slice(&expected).unwrap();
        let tokenizer = Tokenizer::load(&dir, &[]).unwrap();
        let chat = ChatTemplate::new(tokenizer.templates(), tokenizer.special_tokens()).unwrap();
        for mut case in expected.chat {
            let add_generation_prompt = case.variables.remove("add_generation_prompt");
            let rendered = chat.render(&Conversation {
                messages: case.messages,
                tools: None,
                add_generation_prompt: add_generation_prompt.unwrap().is_true(),
                variables: case.variables,
            });
            match (rendered, case.error) {
                (Ok(text), None) => {
                    assert_eq!(text, case.text, "{name}/{}", case.name);
                    let ids = tokenizer.encode(&text, false).unwrap();
                    assert_eq!(ids, case.ids, "{name}/{}", case.name);
                }
                (Err(ChatError::Raised(raised)), Some(error)) => assert_eq!(raised.0, error),
                (rendered, _) => panic!("{name}/{}: {rendered:?}", case.name),
            }
        }
    }
}

#[test]
fn no_template_is_an_error_of_its_own() {
    let chat = ChatTemplate::new(&BTreeMap::new(), &BTreeMap::new()).unwrap();
    let error = chat.render(&conversation("[]")).unwrap_err();
    assert!(matches!(error, ChatError::NoTemplate));
}

#[test]
fn bad_template_is_reported_at_load() {
    let templates = BTreeMap::from([("default".to_owned(), "{% for %}".to_owned())]);
    let error = ChatTemplate::new(&templates, &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, ChatError::Syntax(_)));
}

#[test]
fn failing_template_is_not_a_raised_one() {
    let chat = template("{{ messages.nothing.at_all }}");
    let error = chat.render(&conversation("[]")).unwrap_err();
    assert!(matches!(error, ChatError::Render(_)));
}

#[test]
fn tools_choose_their_template() {
    let sources = [("default", "plain"), ("tool_use", "{{ tools | length }}")];
    let templates = sources.map(|(name, source)| (name.to_owned(), source.to_owned()));
    let chat = ChatTemplate::new(&templates.into(), &BTreeMap::new()).unwrap();
    let mut conversation = conversation("[]");
    assert_eq!(chat.render(&conversation).unwrap(), "plain");
    conversation.tools = Some(Value::from(vec![1, 2]));
    assert_eq!(chat.render(&conversation).unwrap(), "2");
}

#[test]
fn absent_tools_are_none() {
    let source = "{% if tools is none and documents is none %}yes{% endif %}";
    assert_eq!(rendered(source), "yes");
}

#[test]
fn nothing_is_escaped_and_blocks_are_trimmed() {
    let source = "  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n";
    assert_eq!(rendered(source), "  a<b\n");
}

#[test]
fn python_values_and_methods() {
    assert_eq!(
        rendered("{{ true }} {{ none }} {{ 1.0 }} {{ nothing }}"),
        "True None 1.0 "
    );
    assert_eq!(
        rendered("{{ ' a b '.strip().split(' ')[-1].upper() }}"),
        "B"
    );
    assert_eq!(
        rendered("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"),
        "role=user;content=a<b;"
    );
    assert_eq!(
        rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
        "01"
    );
}

/// What `json.dumps(..., ensure_ascii=False)` prints.
#[test]
fn tojson_is_pythons() {
    let messages = r#"[{"z": [1, "é<>&'", null, true], "a": {}, "b": 1.5}]"#;
    let render = |source| template(source).render(&conversation(messages)).unwrap();
    assert_eq!(
        render("{{ messages | tojson }}"),
        r#"[{"z": [1, "é<>&'", null, true], "a": {}, "b": 1.5}]"#
    );
    assert_eq!(
        render("{{ messages[0]['z'][:2] | tojson(indent=2) }}"),
        "[\n  1,\n  \"é<>&'\"\n]"
    );
    let sorted = template("{{ messages | tojson(sort_keys=true) }}");
    assert!(
        sorted.render(&conversation(messages)).is_err(),
        "rather than unsorted"
    );
}

#[test]
fn generation_blocks_render_their_content() {
    let plain =
        "{%- for m in messages -%}\n[ {%- if true -%} {{ m.role }} {%- endif %} ]\n{% endfor %}";
    let marked = plain
        .replace("if true", "generation")
        .replace("endif", "endgeneration");
    assert_eq!(rendered(&marked), rendered(plain));
    assert_eq!(
        python::without_generation_blocks(
            "{%generation%}a{%+  endgeneration  -%}{% set generation = 1 %}"
        ),
        "{%if true%}a{%+  endif  -%}{% set generation = 1 %}"
    );
}

/// Dates from Python's `datetime.fromtimestamp(..., timezone.utc).strftime`.
#[test]
fn strftime_is_pythons() {
    let at = |seconds, format| python::strftime(format, seconds).unwrap();
    assert_eq!(at(0, "%d %b %Y, %A"), "01 Jan 1970, Thursday");
    assert_eq!(at(951_782_400, "%Y-%m-%d %j"), "2000-02-29 060");
    assert_eq!(
        at(1_735_689_599, "%a %e %B %y %I:%M:%S %p"),
        "Tue 31 December 24 11:59:59 PM"
    );
    assert_eq!(
        at(1_741_000_000, "%-d/%-m %F %T 100%%"),
        "3/3 2025-03-03 11:06:40 100%"
    );
    assert!(python::strftime("%Q", 0).is_err());
    assert!(rendered("{{ strftime_now('%Y') }}").parse::<u32>().unwrap() >= 2024);
}
