//! KIVI (Liu et al., ICML 2024, arXiv 2402.02750): asymmetric integers of 2 or 4 bits.
//!
//! Keys are quantised per channel, over [`GROUP`] tokens; values per token, over so many
//! channels. Every group has its minimum and its step, f16 each: 1 bit a value. The paper
//! keeps the latest 128 tokens of a sequence in 16 bits; [`Kivi`] with a residual does so
//! with the last tokens of every chunk, and counts them, without it all are quantised.

use anyhow::{Context as _, ensure};
use half::f16;

use super::table::{self, Packer, Table, Unpacker};
use super::{Chunk, Coder, Parts, from_raw, to_raw};

const GROUP: usize = 32;

#[derive(Debug)]
pub(super) struct Kivi {
    pub(super) bits: u32,
    /// Last tokens that stay as they are.
    pub(super) residual: usize,
}

/// One group, its members in `table` this far apart.
#[derive(Clone, Copy, Debug)]
struct Group {
    start: usize,
    stride: usize,
    len: usize,
}

impl Kivi {
    fn quantised(&self, chunk: &Chunk) -> usize {
        (chunk.layout.tokens() as usize).saturating_sub(self.residual)
    }
}

impl Coder for Kivi {
    fn encode(&self, chunk: &Chunk) -> anyhow::Result<Parts> {
        let quantised = self.quantised(chunk);
        let encode = |table: &Table| {
            let mut scales = Vec::new();
            let mut codes = Packer::default();
            for group in groups(table, quantised) {
                let values = || members(&table.rows, group);
                let low = values().fold(f32::INFINITY, f32::min);
                let high = values().fold(f32::NEG_INFINITY, f32::max);
                let most = f32::from((1u8 << self.bits) - 1);
                let low = f16::from_f32(low);
                let step = f16::from_f32((high - low.to_f32()) / most);
                scales.extend([low.to_le_bytes(), step.to_le_bytes()].concat());
                for value in values() {
                    let number = (value - low.to_f32()) / step.to_f32();
                    #[expect(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        reason = "saturates, and no number becomes zero"
                    )]
                    codes.put(number.round_ties_even().clamp(0.0, most) as u8, self.bits);
                }
            }
            let rest = &table.rows[quantised * table.dim..];
            [scales, codes.finish(), to_raw(chunk.layout.dtype(), rest)].concat()
        };
        Ok(table::tables(chunk).iter().map(encode).collect())
    }

    fn decode(&self, parts: &[Vec<u8>], chunk: &mut Chunk) -> anyhow::Result<()> {
        let mut tables = table::tables(chunk);
        let quantised = self.quantised(chunk);
        ensure!(parts.len() == tables.len(), "a part a head");
        for (table, part) in tables.iter_mut().zip(parts) {
            let count = groups(table, quantised).count();
            let (scales, rest) = part.split_at_checked(4 * count).context("scales")?;
            let bits = quantised * table.dim * self.bits as usize;
            let (codes, rest) = rest.split_at_checked(bits.div_ceil(8)).context("codes")?;
            let mut codes = Unpacker::new(codes);
            let of: Vec<Group> = groups(table, quantised).collect();
            for (group, &[a, b, c, d]) in of.into_iter().zip(scales.as_chunks().0) {
                let low = f16::from_le_bytes([a, b]).to_f32();
                let step = f16::from_le_bytes([c, d]).to_f32();
                for member in 0..group.len {
                    table.rows[group.start + member * group.stride] =
                        low + step * f32::from(codes.take(self.bits));
                }
            }
            let rest = from_raw(chunk.layout.dtype(), rest);
            table.rows[quantised * table.dim..].copy_from_slice(&rest);
        }
        table::fill(chunk, &tables);
        Ok(())
    }
}

/// The groups of a table's first tokens, in the order of their scales.
fn groups(table: &Table, tokens: usize) -> impl Iterator<Item = Group> + use<> {
    let (keys, dim) = (table.keys, table.dim);
    let (outer, inner) = if keys { (dim, tokens) } else { (tokens, dim) };
    (0..outer).flat_map(move |outer| {
        (0..inner).step_by(GROUP).map(move |first| Group {
            start: if keys {
                first * dim + outer
            } else {
                outer * dim + first
            },
            stride: if keys { dim } else { 1 },
            len: GROUP.min(inner - first),
        })
    })
}

fn members(rows: &[f32], group: Group) -> impl Iterator<Item = f32> {
    let values = rows[group.start..].iter().step_by(group.stride);
    values.take(group.len).copied()
}
