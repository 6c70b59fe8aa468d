//! The suite on the shipped model, a few questions long.

use serde_json::Value;

use super::*;

fn shipped() -> Options {
    Options {
        model: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/reader-9m")),
        questions: Some(6),
        tasks: vec!["hop1".into(), "coref3".into()],
        methods: ["prefix", "naive", "naive-unpositioned"]
            .map(String::from)
            .to_vec(),
        chunks: vec![4],
        size: 64,
        steps: Vec::new(),
        sensitivity: None,
        allocation: None,
        profile: None,
        on_training: false,
        plot: None,
        seed: 3,
    }
}

fn rows(options: &Options) -> BTreeMap<String, Value> {
    let report = serde_json::to_value(run(options, false).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    rows.iter()
        .map(|row| (row["name"].as_str().unwrap().to_owned(), row.clone()))
        .collect()
}

#[test]
fn what_is_exact_is_exact_and_the_same_seed_gives_the_same_rows() {
    let found = rows(&shipped());
    let value = |name: &str| found[name]["value"].as_f64().unwrap();
    for gate in ["G0/recompute-all", "G0/prefix", "G0/layer0_keys"] {
        assert!(
            found[&format!("gate/{gate}")]["ratio"].as_f64() >= Some(1.0),
            "{gate}"
        );
    }
    assert_eq!(value("prefix/coref3@4/kl"), 0.0);
    // The check above could fail: reuse is not full prefill.
    assert!(value("naive/coref3/kl") > 0.0);
    assert!(value("naive-unpositioned/continuation/nll_more") != 0.0);
    assert_eq!(value("full/charged"), 1.0);
    assert_eq!(value("questions/hop1"), 6.0);
    assert_eq!(found, rows(&shipped()));
}

#[test]
fn an_unknown_task_is_refused_with_the_known_ones() {
    let options = Options {
        tasks: vec!["hop9".into()],
        ..shipped()
    };
    let error = run(&options, false).unwrap_err().to_string();
    assert!(
        error.contains("hop9") && error.contains("coref2"),
        "{error}"
    );
}

#[test]
fn each_number_of_probes_records_for_itself() {
    let methods = [
        "blend:graded:0.15",
        "blend:graded-1:0.15",
        "blend:graded-4:0.15",
    ];
    let options = Options {
        questions: Some(2),
        tasks: vec!["coref3".into()],
        methods: methods.map(String::from).to_vec(),
        chunks: Vec::new(),
        ..shipped()
    };
    let found = rows(&options);
    let kl = |method: &str| found[&format!("{method}/coref3/kl")]["value"].as_f64();
    assert_eq!(kl(methods[0]), kl(methods[1]));
    assert_ne!(kl(methods[0]), kl(methods[2]));
}
