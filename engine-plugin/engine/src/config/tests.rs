use super::*;

const LLAMA: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3]
}"#;

/// The base config with some fields replaced.
fn with(changes: &str) -> Result<ModelConfig, ConfigError> {
    let mut base: Map<String, Value> = serde_json::from_str(LLAMA).unwrap();
    base.extend(serde_json::from_str::<Map<String, Value>>(changes).unwrap());
    ModelConfig::from_json(&serde_json::to_vec(&base).unwrap())
}

#[test]
fn a_llama_config_is_read() {
    let config = with("{}").unwrap();
    assert_eq!(config.head_dim, 16);
    assert_eq!(config.eos_token_ids, [2, 3]);
    assert_eq!(config.windows, [None, None]);
    assert_eq!(config.qkv_width(), 128);
}

#[test]
fn what_cannot_run_exactly_is_refused_by_field() {
    for (changes, field) in [
        (
            r#"{"quantization_config": {"quant_method": "gptq"}}"#,
            "quantization_config",
        ),
        (
            r#"{"architectures": ["MixtralForCausalLM"]}"#,
            "architectures",
        ),
        (r#"{"num_local_experts": 8}"#, "num_local_experts"),
        (r#"{"hidden_act": "gelu"}"#, "hidden_act"),
        (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor"),
        (
            r#"{"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}"#,
            "rope_scaling",
        ),
        (
            r#"{"rope_parameters": {"rope_type": "longrope"}}"#,
            "rope_parameters",
        ),
        (
            r#"{"rope_parameters": {"full_attention": {"rope_type": "default"}}}"#,
            "rope_parameters",
        ),
        (r#"{"num_key_value_heads": 3}"#, "num_key_value_heads"),
        (r#"{"num_hidden_layers": 0}"#, "num_hidden_layers"),
        (r#"{"hidden_size": -1}"#, "hidden_size"),
        (r#"{"vocab_size": null}"#, "vocab_size"),
        (r#"{"head_dim": 15}"#, "head_dim"),
        (r#"{"rms_norm_eps": "small"}"#, "rms_norm_eps"),
        (r#"{"tie_word_embeddings": 1}"#, "tie_word_embeddings"),
        (
            r#"{"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"]}"#,
            "layer_types",
        ),
    ] {
        let text = with(changes).unwrap_err().to_string();
        assert!(text.starts_with(field), "{changes}: {text}");
    }
    assert!(matches!(
        ModelConfig::from_json(b"[1, 2"),
        Err(ConfigError::Json(_))
    ));
}

#[test]
fn windows_follow_transformers() {
    let window = |changes: &str| with(changes).unwrap().windows;
    let mistral = r#""architectures": ["MistralForCausalLM"]"#;
    assert_eq!(
        window(&format!(r#"{{{mistral}, "sliding_window": 100}}"#)),
        [Some(100); 2]
    );
    assert_eq!(
        window(&format!(r#"{{{mistral}, "sliding_window": 512}}"#)),
        [None; 2]
    );
    assert_eq!(
        window(&format!(r#"{{{mistral}, "sliding_window": null}}"#)),
        [None; 2]
    );
    assert_eq!(
        window(&format!(
            r#"{{{mistral}, "max_position_embeddings": 8192}}"#
        )),
        [Some(4096); 2]
    );
    let qwen = r#""architectures": ["Qwen2ForCausalLM"], "sliding_window": 64"#;
    assert_eq!(window(&format!("{{{qwen}}}")), [None; 2]);
    assert_eq!(
        window(&format!(
            r#"{{{qwen}, "use_sliding_window": true, "max_window_layers": 1}}"#
        )),
        [None, Some(64)]
    );
}

#[test]
fn canonical_text_tells_configs_apart() {
    let base = with("{}").unwrap().canonical();
    for changes in [
        r#"{"rope_theta": 5e5}"#,
        r#"{"rms_norm_eps": 1e-6}"#,
        r#"{"rope_scaling": {"type": "linear", "factor": 2.0}}"#,
        r#"{"architectures": ["MistralForCausalLM"]}"#,
        r#"{"attention_bias": true}"#,
    ] {
        assert_ne!(with(changes).unwrap().canonical(), base, "{changes}");
    }
    assert_eq!(
        with(r#"{"eos_token_id": 7, "use_cache": false}"#)
            .unwrap()
            .canonical(),
        base
    );
}
