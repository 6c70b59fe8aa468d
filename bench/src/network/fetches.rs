//! Fetches of an engine: at every level, and as fine as deadlines allow.

use std::time::Duration;

use anyhow::ensure;
use kvasir_tests::harness::{Answer, Rig, Use};
use kvasir_types::Level;

use crate::report::{Report, Row, median};

use super::bed::{Bed, as_f64, millis};

const RATES: [u32; 2] = [100, 1000];
/// Where deadlines are kept.
const SLOW: u32 = 100;
const DEADLINES_MS: [u32; 4] = [200, 300, 400, 600];
const CHANGE_DEADLINES_MS: [u32; 2] = [400, 800];
/// Of a request: when the link gets worse, and when better again.
const WORSE_AT: Duration = Duration::from_millis(50);
const BETTER_AT: Duration = Duration::from_millis(250);

pub(super) async fn levels(bed: &Bed<'_>, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let runs = if quick { 3 } else { 7 };
    let alone = bed.rig(Level::RAW, |_| {});
    let mut computed = Vec::new();
    let mut logits = Vec::new();
    for _ in 0..runs.min(3) {
        let answer = alone.ask(&bed.prompt, Use::Nothing).await;
        computed.push(millis(answer.ttft()));
        logits = answer.logits;
    }
    let computed = median(&mut computed);
    for mbps in RATES {
        bed.network.set_mbps(mbps)?;
        let mut raw = None;
        for (stored, fetched) in [
            (Level::RAW, Level::RAW),
            (Level::LOSSLESS, Level::LOSSLESS),
            (Level::L2, Level::L2),
            (Level::L2, Level::L1),
            (Level::L2, Level::L0),
        ] {
            let reader = bed.rig(stored, |config| config.codec.fetch = Some(fetched));
            bed.connected(&reader).await?;
            let (mut times, mut bytes) = (Vec::new(), 0);
            // The first one opens windows.
            for run in 0..=runs {
                let answer = bed.fetch(&reader).await?;
                ensure!(
                    !fetched.is_exact() || answer.logits == logits,
                    "fetched and computed logits differ"
                );
                bytes = answer.usage.fetched_bytes;
                if run > 0 {
                    times.push(millis(answer.ttft()));
                }
            }
            let time = median(&mut times);
            let raw = *raw.get_or_insert(time);
            let name = format!("fetch/{mbps}/{fetched}");
            report.push(Row::new(name.clone(), time, "ms").against(raw, raw / time));
            report.push(Row::new(format!("{name}/bytes"), as_f64(bytes), "B"));
        }
        let raw = raw.unwrap_or(computed);
        let row = Row::new(format!("fetch/{mbps}/computed"), computed, "ms");
        report.push(row.against(raw, raw / computed));
    }
    Ok(())
}

pub(super) async fn deadlines(
    bed: &Bed<'_>,
    quick: bool,
    report: &mut Report,
) -> anyhow::Result<()> {
    let runs = if quick { 5 } else { 20 };
    bed.network.set_mbps(SLOW)?;
    for deadline in DEADLINES_MS {
        let mut kept = Kept::default();
        let reader = steered(bed, deadline).await?;
        for run in 0..=runs {
            let answer = reader.ask(&bed.prompt, Use::Read).await;
            kept.note(run, &answer);
        }
        kept.report(report, &format!("deadline/{SLOW}/{deadline}"), deadline);
    }
    for deadline in CHANGE_DEADLINES_MS {
        let mut kept = Kept::default();
        let reader = steered(bed, deadline).await?;
        for run in 0..=runs {
            let change = async {
                tokio::time::sleep(WORSE_AT).await;
                bed.network.set_mbps(SLOW / 5)?;
                tokio::time::sleep(BETTER_AT - WORSE_AT).await;
                bed.network.set_mbps(SLOW)
            };
            let (answer, changed) = tokio::join!(reader.ask(&bed.prompt, Use::Read), change);
            changed?;
            kept.note(run, &answer);
        }
        kept.report(report, &format!("change/{deadline}"), deadline);
    }
    Ok(())
}

/// An engine that keeps to a deadline, and is connected.
async fn steered(bed: &Bed<'_>, deadline: u32) -> anyhow::Result<Rig> {
    let rig = bed.rig(Level::L2, |config| {
        config.deadline = Some(Duration::from_millis(deadline.into()));
    });
    bed.connected(&rig).await?;
    Ok(rig)
}

/// What became of requests with a deadline.
#[derive(Debug, Default)]
struct Kept {
    times: Vec<f64>,
    bytes: Vec<f64>,
    loaded: Vec<f64>,
    coarsest: Vec<f64>,
}

impl Kept {
    /// The first one teaches.
    fn note(&mut self, run: usize, answer: &Answer) {
        if run == 0 {
            return;
        }
        self.times.push(millis(answer.ttft()));
        self.bytes.push(as_f64(answer.usage.fetched_bytes));
        self.loaded.push(as_f64(answer.usage.cached_tokens as u64));
        if let Some(level) = answer.usage.cached_level {
            self.coarsest.push(f64::from(level.parts()) - 1.0);
        }
    }

    fn report(mut self, report: &mut Report, name: &str, deadline: u32) {
        let due = f64::from(deadline);
        let late = self.times.iter().filter(|time| **time > due).count();
        let share = as_f64(late as u64) / as_f64(self.times.len() as u64);
        let time = median(&mut self.times);
        report.push(Row::new(name, time, "ms").against(due, due / time));
        report.push(Row::new(format!("{name}/missed"), share, "share"));
        let bytes = median(&mut self.bytes);
        report.push(Row::new(format!("{name}/bytes"), bytes, "B"));
        let loaded = median(&mut self.loaded);
        report.push(Row::new(format!("{name}/loaded"), loaded, "tokens"));
        if !self.coarsest.is_empty() {
            let mean = self.coarsest.iter().sum::<f64>() / as_f64(self.coarsest.len() as u64);
            report.push(Row::new(format!("{name}/coarsest"), mean, "level"));
        }
    }
}
