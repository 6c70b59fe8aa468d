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
    let blends = fixture.get("blend").and_then(Value::as_array);
    let blends: Vec<Report> = blends
        .into_iter()
        .flatten()
        .map(|report| read(report, QUALITY).unwrap())
        .collect();
    let mut files = page(&quality, kvstats.as_ref()).unwrap();
    if !blends.is_empty() {
        files.extend(blending(&blends).unwrap());
    }
    files
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
        quality: Some(quality.clone()),
        kvstats: None,
        blend: Vec::new(),
        out: dir.path().join("docs"),
    };
    run(&options).unwrap();
    assert!(options.out.join("quality.md").is_file());
    assert!(options.out.join("quality/kl.svg").is_file());
    // Nothing in it is blended.
    options.blend = vec![quality];
    let error = run(&options).unwrap_err().to_string();
    assert!(error.contains("`blend:RULE:BUDGET/charged`"), "{error}");
    options.quality = Some(dir.path().join("missing.json"));
    assert!(matches!(run(&options), Err(PageError::Read { .. })));
}

/// The fixture with two runs of blending, of which the second asks about one task only.
fn blended() -> Value {
    let mut fixture = fixture();
    fixture["blend"] = serde_json::from_str(include_str!("blend/fixture.json")).unwrap();
    fixture
}

/// The page on blending.
fn blending_text(files: &[(String, String)]) -> String {
    let page = files.iter().find(|(name, _)| name == "blending.md");
    page.unwrap().1.clone()
}

/// The same with those rows of the first run that `change` keeps, and as it leaves them.
fn blended_but(change: impl Fn(&str, &mut Value) -> bool) -> Value {
    let mut fixture = blended();
    let rows = fixture["blend"][0]["rows"].as_array_mut().unwrap();
    rows.retain_mut(|row| {
        let name = row["name"].as_str().unwrap().to_owned();
        change(&name, row)
    });
    fixture
}

#[test]
fn blending_is_shown_by_what_was_charged() {
    let files = made(&blended());
    let plots = ["blend-exact-match", "blend-kl", "blend-gap"];
    assert_eq!(
        names(&files)[6..],
        plots.map(|name| format!("quality/{name}.svg"))
    );
    let text = blending_text(&files);
    for line in [
        "page --blend FILE --blend FILE --out DIR",
        "| questions | 100, 40 |",
        // Full prefill and naive reuse are 1.0 apart over two tasks together.
        "| random choice at 15 % closes no more than 25 % of the gap | `blend:random:0.15`, 14.9 % charged | 0.120 | met |",
        "at 15 % or less | `blend:graded:0.15`, 15.0 % charged | 0.990 | met |",
        "of full prefill | `blend:graded:0.15`, 15.0 % charged | −0.005 | met |",
        // Not `hop1`: the interval of its loss is around zero.
        "They are `coref2`, `ordinal`.",
        "![KL from full prefill by what is computed anew](quality/blend-kl.svg)",
        // Means over tasks with a gap, and over all.
        "| `full` |  | 0.900 | – | 1.000 | 0.900 | – | 1.000 |",
        "| `naive` |  | 0.400 | 1.390 | 0.000 | 0.563 | 0.940 | 0.000 |",
        "| `graded` | 5.0 % | 0.840 | 0.205 | 0.880 | 0.867 | 0.141 | 0.901 |",
        // Asked about one of the tasks with a gap.
        "| `question` | 14.0 % | – | – | – | – | – | – |",
        // A task, and all of them.
        "<details><summary>coref2</summary>\n\n| rule | charged | exact match |",
        "| `graded` | 15.0 % | 0.820 [0.800, 0.840] | 0.003 [0.002, 0.004] | 0.010 [0.005, 0.015] | 1.000 |",
        "| `hkvd-kv` | 30.1 % | 0.880 [0.860, 0.900] | 0.500",
        // Numbers of chunks, in the run that has them.
        "| `coref2` | 2 | 0.900 [0.880, 0.920] | 0.850 [0.830, 0.870]; 0.050 | 0.890 [0.870, 0.910]; 0.010 | – |",
        "| `coref2` | 8 | 0.800 [0.780, 0.820] |",
        "- `hkvd-kv`: as `hkvd-k`, by K and V.",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    // 20 % is near none of the budgets, but among the means.
    assert_eq!(text.matches("| `graded` | 20.0 % |").count(), 1);
    for (name, svg) in &files[7..] {
        assert!(svg.contains("hkvd-kv") && svg.contains("charged"), "{name}");
        // Drawn only where it was asked about all tasks.
        assert!(!svg.contains("question"), "{name}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{name}");
    }
}

#[test]
fn tasks_may_be_asked_in_runs_of_their_own() {
    let means = |fixture: &Value| -> Vec<String> {
        let text = blending_text(&made(fixture));
        let section = text
            .split("## ")
            .find(|it| it.starts_with("Means over tasks"));
        let lines = section
            .unwrap()
            .lines()
            .filter(|line| line.contains(" % |"));
        lines.map(str::to_owned).collect()
    };
    let mut apart = blended();
    let mut other = apart["blend"][0].clone();
    let of = |row: &Value| row["name"].as_str().unwrap().contains("/ordinal");
    apart["blend"][0]["rows"]
        .as_array_mut()
        .unwrap()
        .retain(|row| !of(row));
    let keep = |row: &Value| of(row) || row["name"].as_str().unwrap().ends_with("/charged");
    other["rows"].as_array_mut().unwrap().retain(keep);
    // A rule is held against its own run, whatever others say of full prefill.
    let rows = apart["blend"][0]["rows"].as_array_mut().unwrap();
    rows.push(json!({"name": "full/ordinal/em", "value": 0.5, "unit": "share"}));
    rows.push(json!({"name": "naive/ordinal/em", "value": 0.4, "unit": "share"}));
    apart["blend"].as_array_mut().unwrap().push(other);
    assert_eq!(means(&apart), means(&blended()));
    assert!(means(&apart).len() > 5);
}

#[test]
fn a_bar_that_is_missed_is_bold() {
    let verdicts = |method: &str, measure: &str, new: f64| {
        let named = format!("{method}/{measure}");
        let fixture = blended_but(|name, row| {
            if name == named {
                row["value"] = json!(new);
            }
            true
        });
        let text = blending_text(&made(&fixture));
        let bars = text.lines().filter(|line| line.contains(" % charged | "));
        let missed = bars.map(|line| line.ends_with("| **MISSED** |"));
        missed.collect::<Vec<_>>()
    };
    let (random, graded) = ("blend:random:0.15", "blend:graded:0.15");
    assert_eq!(verdicts(random, "ordinal/em", 0.40), [false; 3]);
    assert_eq!(verdicts(random, "ordinal/em", 0.42), [true, false, false]);
    assert_eq!(verdicts(graded, "ordinal/em", 0.69), [false; 3]);
    assert_eq!(verdicts(graded, "ordinal/em", 0.67), [false, true, false]);
    for off in [0.011, -0.011] {
        let missed = verdicts(graded, "hop1/em_loss", off);
        assert_eq!(missed, [false, false, true]);
    }
}

#[test]
fn of_blending_too_what_has_no_rows_is_left_out() {
    let text = |fixture: &Value| blending_text(&made(fixture));
    let before = made(&fixture());
    assert!(
        before
            .iter()
            .all(|(name, text)| !name.contains("blend") && !text.contains("blend"))
    );

    let files = made(&blended_but(|name, _| !name.ends_with("/kl")));
    assert!(!names(&files).contains(&"quality/blend-kl.svg"));
    assert!(names(&files).contains(&"quality/blend-gap.svg"));

    // The bar is of the dearest that it allows.
    let dropped = |name: &str| name.starts_with("blend:graded:0.15/");
    let cheaper = text(&blended_but(|name, _| !dropped(name)));
    assert!(!cheaper.contains("| `blend:graded:0.15`, 15.0 % charged |"));

    // A charge that is near no budget is among the means only.
    let between = text(&blended_but(|name, row| {
        if name == "blend:hkvd-kv:0.3/charged" {
            row["value"] = json!(0.26);
        }
        true
    }));
    assert_eq!(between.matches("| `hkvd-kv` | 26.0 % |").count(), 1);

    // All tasks of a run are not all tasks when it left some out.
    let mut some = blended();
    some["blend"].as_array_mut().unwrap().reverse();
    let rows = some["blend"][0]["rows"].as_array_mut().unwrap();
    rows.push(json!({"name": "full/all/em", "value": 0.123, "unit": "share"}));
    assert!(!text(&some).contains("0.123"));

    // No loss is above zero: no gap, nothing to close.
    let mut none = blended();
    for run in none["blend"].as_array_mut().unwrap() {
        let rows = run["rows"].as_array_mut().unwrap();
        rows.retain(|row| !row["name"].as_str().unwrap().ends_with("/em_loss"));
    }
    let none = text(&none);
    assert!(none.contains("There are none.") && !none.contains("### Bars"));
    assert!(!none.contains("KL (nats), with a gap"));
}
