//! `network`: gets and fetches between two hosts, over links that are slow, lossy, change and
//! die. Needs root.
//!
//! The hosts are network namespaces of this kernel ([`Network`]), so both ends share its
//! processors, and a round trip takes what the kernel takes. The engine runs in this process,
//! the daemon in its own. `RATE` is millions of bits a second, each way.
//!
//! # Rows
//! `gets`, 16 MiB at a time from the daemon's memory, all layers, checksums compared:
//! - `tcp/RATE`: the same bytes over one TCP socket, MB/s;
//! - `quic_get/RATE`, `grpc_get/RATE`: gets, with `ratio` = this ÷ `tcp`; `/64KiB/p50` the time of
//!   one of 64 KiB, in ms;
//! - `relay/RATE`, gets over QUIC through a relay, and through one that loses a datagram in a
//!   hundred each way (`loss-1`), delays them by 10 ms each way (`rtt-20`), or both, with `ratio`
//!   = this ÷ `relay`; both not with `--quick`.
//!
//! `levels`: `fetch/RATE/computed` and `fetch/RATE/LEVEL`, time to the first token of a prompt of
//! `--tokens` tokens of context, over QUIC, with `ratio` = that of `raw` ÷ this; `/bytes`.
//!
//! `deadlines`, of what is stored at level 2, over QUIC: `deadline/RATE/MS`, time to the first
//! token with `ratio` = deadline ÷ this; `/missed`: share of runs that took longer; `/bytes`;
//! `/loaded`: tokens that were not computed; `/coarsest`: mean of the coarsest level, 0 to 2, of
//! runs that loaded something. `change/MS` and so on the same, while the rate falls to a fifth
//! 50 ms after the request, and rises again 200 ms later.
//!
//! `faults`, 768 tokens of context: `computed`; `killed`: from the death of the daemon's process
//! in the middle of a fetch to the first token, with `ratio` = computed ÷ this;
//! `stalled/waited_p50`, `_max`: until an engine gave up waiting for a daemon that was stopped in
//! the middle of a fetch, less the fetch's budget, against the 10 ms of the design;
//! `stalled/overrun_p50`, `_max`: its time to the first token, less budget and `computed`.
//!
//! `overlap`, a prompt whose context is cached and whose last 512 tokens are not, with an engine
//! that leaves a core to the daemon and the sockets of both hosts:
//! `overlap/transfer`: getting its chunks alone; `overlap/compute`: computing the rest over pages
//! that have them; `overlap/ttft`: both, with `ratio` = this ÷ the longer of them, over a link on
//! which both take about as long; `overlap/least`: the same where everything but the first layer
//! of one and the last of the other is hidden.

mod bed;
mod faults;
mod fetches;
mod gets;
mod overlap;

use std::path::PathBuf;

use kvasir_tests::network::Network;

use crate::report::Report;

use bed::Bed;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A model trained on the corpus, in the Hugging Face layout.
    #[arg(long, default_value = "models/reader-9m")]
    model: PathBuf,
    /// Tokens of context of `levels` and `deadlines`, a multiple of 256. Default: 3840, or 1536
    /// with `--quick`.
    #[arg(long)]
    tokens: Option<usize>,
    /// Only some of: gets, levels, deadlines, faults, overlap.
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    part: Vec<String>,
}

pub(crate) fn run(options: &Options, quick: bool) -> anyhow::Result<Report> {
    let tokens = options.tokens.unwrap_or(if quick { 1536 } else { 3840 });
    anyhow::ensure!(
        tokens > 0 && tokens.is_multiple_of(256),
        "--tokens {tokens} is not a multiple of 256"
    );
    if !quick {
        eprintln!("this takes about six minutes; --quick takes about one and a half");
    }
    let mut report = Report::new("network");
    report.set("model", options.model.to_string_lossy());
    report.set("tokens", tokens as u64);
    let network = Network::start(1000)?;
    let asked = |part: &str| options.part.is_empty() || options.part.iter().any(|it| it == part);
    if asked("gets") {
        gets::run(&network, quick, &mut report)?;
    }
    if asked("levels") || asked("deadlines") {
        let bed = Bed::new(&network, &options.model, tokens)?;
        network.near().run(|| async {
            bed.store().await?;
            if asked("levels") {
                fetches::levels(&bed, quick, &mut report).await?;
            }
            if asked("deadlines") {
                fetches::deadlines(&bed, quick, &mut report).await?;
            }
            anyhow::Ok(())
        })??;
    }
    if asked("faults") {
        faults::run(&network, &options.model, quick, &mut report)?;
    }
    if asked("overlap") {
        overlap::run(&network, quick, &mut report)?;
    }
    Ok(report)
}
