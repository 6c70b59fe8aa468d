use std::path::Path;

use serde_json::{Value, json};

use super::read::{Gate, Quality, Report, Side};
use super::*;

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixture.json")).unwrap()
}

/// Reads a report as from the last line of a file.
fn read(report: &Value, suite: &'static str) -> Result<Report, PageError> {
    let text = format!("  hop1 0.98 share\n\n{report}\n\n");
    Report::parse(&text, Path::new("out.json"), suite)
}

fn made(fixture: &Value) -> Vec<(String, String)> {
    let quality = read(&fixture["quality"], QUALITY).unwrap();
    let kvstats = fixture
        .get("kvstats")
        .map(|report| read(report, KVSTATS).unwrap());
    page(&quality, kvstats.as_ref()).unwrap()
}

/// The fixture without rows whose names `drop` holds for.
fn without(drop: impl Fn(&str) -> bool) -> Value {
    let mut fixture = fixture();
    for suite in [QUALITY, KVSTATS] {
        let rows = fixture[suite]["rows"].as_array_mut().unwrap();
        rows.retain(|row| !drop(row["name"].as_str().unwrap()));
    }
    fixture
}

fn names(files: &[(String, String)]) -> Vec<&str> {
    files.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn the_page_says_that_it_is_generated_and_of_what() {
    let files = made(&fixture());
    assert_eq!(
        names(&files),
        [
            "quality.md",
            "quality/exact-match.svg",
            "quality/kl.svg",
            "quality/growth.svg",
            "quality/kvstats.svg",
        ]
    );
    let text = &files[0].1;
    let first = text.lines().next().unwrap();
    assert!(
        first.contains("kvasir-bench page --quality FILE --kvstats FILE --out DIR"),
        "{first}"
    );
    for line in [
        "| model | `reader-17m` | – |",
        "| memory | 24 GiB | 24 GiB |",
        "| quick | no | – |",
        "![Exact match by task](quality/exact-match.svg)",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(text.contains("\n1,000 questions a cell. "));
}

#[test]
fn reports_of_two_models_are_told_apart() {
    let mut fixture = fixture();
    for (digest, differ) in [("00ff", false), ("ff00", true)] {
        fixture["kvstats"]["settings"] = json!({"model_digest": digest});
        let text = &made(&fixture)[0].1;
        assert_eq!(text.contains("of different models"), differ);
    }
}

#[test]
fn tables_hold_values_with_their_intervals() {
    let text = &made(&fixture())[0].1;
    for line in [
        // Exact match, loss, continuation, charges, growth, layers.
        "| task | `full` | `naive` | `delta-4bit` | `recompute-all` |",
        "| `coref2` | 0.920 [0.910, 0.930] | 0.520 [0.500, 0.540] | 0.900 [0.880, 0.920] | 0.920 [0.900, 0.940] |",
        "| `coref2` | 0.400 [0.385, 0.415] | 0.020 [0.005, 0.035] | 0.000 [−0.015, 0.015] |",
        "| `naive` | 2.900 [2.800, 3.000] | 0.400 [0.300, 0.500] |",
        "| `naive` | 0.002 | 12,582,912 | 32.000 |",
        "| `coref2` | 12 | 0.450 [0.435, 0.465] | 0.022 [0.007, 0.037] | 0.000 [−0.015, 0.015] |",
        "### V\n\n| layer | Share of the mean (share) | Length of the first token (ratio) |",
        "| median | 0.650 | – |",
        "| 2 | 0.750 | 0.250 |",
        "| 2 | 0.800 [0.500, 0.900] |",
        "| `contexts` | 32.000 | contexts |",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    // Cells with a count are for growth only.
    assert_eq!(text.matches("coref2@12").count(), 0);
}

#[test]
fn failed_gates_come_first_and_are_bold() {
    let text = &made(&fixture())[0].1;
    assert!(text.contains("**2 of 6 gates FAILED.**"));
    let gates: Vec<&str> = text.lines().filter(|line| line.contains("`G")).collect();
    let starts = |line: &str, start: &str| assert!(line.starts_with(start), "{line}");
    starts(
        gates[0],
        "| **`G1/coref2`** | **0.800** | **≥ 0.850** | **share** | **FAILED** |",
    );
    starts(
        gates[1],
        "| **`G3/hop1`** | **0.030** | **≤ 0.020** | **share** | **FAILED** |",
    );
    starts(
        gates[2],
        "| `G0/recompute-all` | 2.0e−5 | ≤ 0.001 | logit | held |",
    );
    starts(gates[5], "| `G6/rank_correlation` | 0.750 | ≥ 0.300 |");
}

#[test]
fn a_gate_without_a_number_failed() {
    let mut fixture = fixture();
    let rows = fixture["quality"]["rows"].as_array_mut().unwrap();
    rows.push(
        json!({"name": "gate/G2/positions", "value": null, "unit": "share",
                     "limit": 0.1, "ratio": 0.0}),
    );
    let report = read(&fixture["quality"], QUALITY).unwrap();
    let gate: Gate<'_> = report.gates().last().unwrap();
    assert!(!gate.held());
    assert_eq!(gate.bar(), Some((Side::Either, 0.1)));
    assert!(made(&fixture)[0].1.contains("**not a number**"));
}

#[test]
fn all_held_is_said_too() {
    let text = &made(&without(|name| {
        matches!(name, "gate/G1/coref2" | "gate/G3/hop1")
    }))[0]
        .1;
    assert!(text.contains("All 4 gates held."));
    assert!(!text.contains("FAILED"));
    let text = &made(&without(|name| name.starts_with("gate/")))[0].1;
    assert!(text.contains("judges no gate"));
}

#[test]
fn the_same_json_gives_the_same_bytes() {
    assert_eq!(made(&fixture()), made(&fixture()));
}

#[test]
fn plots_are_svg_on_white_with_labels() {
    let files = made(&fixture());
    for (name, svg) in &files[1..] {
        assert!(svg.starts_with("<svg width=\"900\""), "{name}");
        assert!(svg.trim_end().ends_with("</svg>"), "{name}");
        assert!(svg.contains("fill=\"#FFFFFF\""), "{name}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{name}");
    }
    let (_, exact) = &files[1];
    for text in ["coref2", "delta-4bit", "exact match (share)"] {
        assert!(exact.contains(text), "{text}");
    }
}

#[test]
fn what_has_no_rows_is_left_out() {
    let gone = |measures: &'static [&str]| {
        without(move |name| measures.iter().any(|measure| name.ends_with(measure)))
    };
    let files = made(&gone(&["/kl", "/em_loss"]));
    assert_eq!(
        names(&files),
        [
            "quality.md",
            "quality/exact-match.svg",
            "quality/kvstats.svg"
        ]
    );
    assert!(!files[0].1.contains("Growth with"));

    let mut only = without(|name| !name.ends_with("/em"));
    only.as_object_mut().unwrap().remove("kvstats");
    only["quality"].as_object_mut().unwrap().remove("settings");
    let files = made(&only);
    assert_eq!(names(&files), ["quality.md", "quality/exact-match.svg"]);
    for section in ["KV statistics", "Continuation", "charged", "Distance"] {
        assert!(!files[0].1.contains(section), "{section}");
    }
}

#[test]
fn names_that_are_new_are_shown_as_they_are() {
    let text = &made(&fixture())[0].1;
    assert!(text.contains("## Other rows\n\n### surprise\n"));
    assert!(text.contains("- `delta-4bit`: not described here."));
}

#[test]
fn many_methods_get_more_panels() {
    let mut fixture = fixture();
    let rows = fixture["quality"]["rows"].as_array_mut().unwrap();
    for method in 0..20 {
        for task in 0..12 {
            let name = format!("codec-{method}/task{task}/em");
            rows.push(json!({"name": name, "value": 0.5, "unit": "share"}));
        }
    }
    let files = made(&fixture);
    let (_, exact) = &files[1];
    assert!(exact.matches("exact match (share)").count() > 2);
    assert!(exact.contains("codec-19") && exact.contains("task11"));
}

#[test]
fn a_report_reads_as_it_is_written() {
    let mut report = crate::report::Report::new(QUALITY);
    report.set("chunks", 8);
    report.push(crate::report::Row::new("full/hop1/em", 0.5, "share").within(Some((0.4, 0.6))));
    let written = serde_json::to_value(&report).unwrap();
    let read = read(&written, QUALITY).unwrap();
    let quality = Quality::new(&read);
    assert_eq!(quality.base, Some(8));
    let point = quality.row("full", "hop1", "em").unwrap().point().unwrap();
    assert_eq!((point.value, point.lo, point.hi), (0.5, 0.4, 0.6));
}

#[test]
fn bad_input_says_what_to_do() {
    let path = Path::new("out.json");
    let says = |error: PageError, text: &str| {
        let said = error.to_string();
        assert!(said.contains(text) && said.contains("out.json"), "{said}");
    };
    let parse = |text: &str| Report::parse(text, path, QUALITY).unwrap_err();
    says(
        parse(" \n"),
        "write the output of `kvasir-bench quality --json`",
    );
    says(parse("error: no model"), "look whether the run ended well");
    says(parse("{}"), "is not a report");
    let error = read(&fixture()["kvstats"], QUALITY).unwrap_err();
    says(error, "is a report of `kvstats`, not of `quality`");
    let none = without(|name| name.ends_with("/em"));
    let quality = read(&none["quality"], QUALITY).unwrap();
    says(
        check(&quality, path, None, None).unwrap_err(),
        "has no rows `METHOD/TASK/em`",
    );
}

#[test]
fn the_page_is_written_to_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let quality = dir.path().join("quality.json");
    std::fs::write(&quality, fixture()["quality"].to_string()).unwrap();
    let mut options = Options {
        quality,
        kvstats: None,
        out: dir.path().join("docs"),
    };
    run(&options).unwrap();
    assert!(options.out.join("quality.md").is_file());
    assert!(options.out.join("quality/kl.svg").is_file());
    options.quality = dir.path().join("missing.json");
    assert!(matches!(run(&options), Err(PageError::Read { .. })));
}
