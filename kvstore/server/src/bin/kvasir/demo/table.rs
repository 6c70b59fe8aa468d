//! The table a person reads.

use std::io::{self, Write};

use kvasir_types::ByteSize;

use super::Outcome;

pub(super) fn print(out: &mut dyn Write, outcome: &Outcome) -> io::Result<()> {
    writeln!(out, "Time to first token, {}", outcome.model)?;
    writeln!(out)?;
    writeln!(
        out,
        "{:<12} {:>7} {:>12} {:>17} {:>17} {:>7} {:>9}  {:<10} answer",
        "document", "tokens", "computed", "from memory", "from disk", "reused", "moved", "logits"
    )?;
    for row in &outcome.documents {
        writeln!(
            out,
            "{:<12} {:>7} {:>9.1} ms {:>8.1} ms {:>4.1}x {:>8.1} ms {:>4.1}x {:>7} {:>9}  {:<10} {}",
            row.document,
            row.tokens,
            row.computed_ms,
            row.memory_ms,
            row.computed_ms / row.memory_ms,
            row.disk_ms,
            row.computed_ms / row.disk_ms,
            row.reused_tokens,
            ByteSize::bytes(row.bytes).human().to_string(),
            if row.identical { "identical" } else { "DIFFER" },
            row.answer,
        )?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "{} questions, each answered with a computed and with a fetched prefill: {}.",
        outcome.questions,
        if outcome.identical {
            "answers and logits are identical, bit for bit"
        } else {
            "ANSWERS OR LOGITS DIFFER"
        }
    )?;
    if let Some(count) = outcome.as_transformers {
        writeln!(
            out,
            "{count} of {} answers are the ones Hugging Face transformers gives.",
            outcome.questions
        )?;
    }
    writeln!(
        out,
        "Fetched {} in all. Peak memory: daemon {}, engine {}; host tier {} of its {}.",
        ByteSize::bytes(outcome.bytes_moved).human(),
        ByteSize::bytes(outcome.daemon_peak_bytes).human(),
        ByteSize::bytes(outcome.engine_peak_bytes).human(),
        ByteSize::bytes(outcome.memory_tier_peak_bytes).human(),
        ByteSize::bytes(outcome.memory_tier_capacity_bytes).human(),
    )
}
