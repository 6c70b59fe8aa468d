//! Layers in the form that the kernel takes: tables of numbers, all of them checked.
//!
//! Nothing here needs a device. A [`Batch`] holds what [`LayerCodec::plan`] says of some layers,
//! cell after cell, and copies the words of their streams side by side and aligned.

use kvasir_codec::{CellError, LayerCodec, LayerPlan, Pairing, PlanError, Rotation, StreamError};
use kvasir_types::{DType, Plane};

use crate::placement::{Placement, PlacementError};

/// Lanes of a stream, and of a warp.
pub(crate) const LANES: usize = 32;

/// A layer to decode.
#[derive(Clone, Copy, Debug)]
pub struct LayerJob<'a> {
    /// Of the layer's chunk; without a profile.
    pub codec: &'a LayerCodec<'a>,
    /// The base, and any number of refinements in order.
    pub parts: &'a [&'a [u8]],
    /// Where its values go in the buffer.
    pub placement: &'a Placement,
    /// Which of the buffers.
    pub buffer: usize,
}

/// Why layers cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// A layer's bytes are damaged, or not for a device.
    #[error("layer {layer} of a batch")]
    Layer {
        /// Which, in the order of the batch.
        layer: usize,
        /// What is wrong with it.
        #[source]
        source: PlanError,
    },
    /// A layer's values have no place.
    #[error("the places of layer {layer} of a batch")]
    Placement {
        /// Which, in the order of the batch.
        layer: usize,
        /// What is wrong with them.
        #[source]
        source: PlacementError,
    },
    /// There is no such buffer.
    #[error("layer {layer} of a batch goes to a buffer that is not there")]
    Buffer {
        /// Which, in the order of the batch.
        layer: usize,
    },
    /// A batch has more than 2^32 of something.
    #[error("a batch is too large; decode fewer layers at once")]
    TooLarge,
}

/// Some layers, as the kernel takes them. Sections are little-endian, as all devices are.
#[derive(Debug, Default)]
pub(crate) struct Batch<'a> {
    pub(crate) cells: Vec<u8>,
    pub(crate) groups: Vec<u8>,
    pub(crate) words: Vec<u8>,
    pub(crate) states: Vec<u8>,
    pub(crate) classes: Vec<u8>,
    pub(crate) offsets: Vec<u8>,
    pub(crate) outlier_positions: Vec<u8>,
    pub(crate) outlier_values: Vec<u8>,
    pub(crate) angles: Vec<u8>,
    pub(crate) exact: Vec<u8>,
    pub(crate) pages: Vec<u8>,
    /// By cell: the layer it is of.
    pub(crate) layer_of_cell: Vec<usize>,
    /// Numbers that a warp needs room for.
    pub(crate) numbers_per_warp: u32,
    /// Whose angles are there already, and where.
    rotations: Vec<(&'a Rotation, [u32; 2])>,
}

/// `Cell` in decode.cu.
pub(crate) struct CellRecord {
    group: u32,
    first_token: u32,
    tokens: u32,
    words: [u32; LayerPlan::LEVELS],
    word_counts: [u32; LayerPlan::LEVELS],
    outliers: u32,
    outlier_count: u32,
}

/// `Group` in decode.cu.
struct GroupRecord {
    channels: u32,
    blocks: u32,
    heads: u32,
    dim: u32,
    levels: u32,
    step: f32,
    dtype: u32,
    exact: u32,
    exact_tokens: u32,
    angles: AnglesRecord,
    pages: u32,
    page_tokens: u32,
    destination: u32,
    start: u64,
    page_stride: u64,
    token_stride: u64,
    head_stride: u64,
}

#[derive(Clone, Copy, Default)]
struct AnglesRecord {
    pairing: u32,
    pairs: u32,
    cosines: u32,
    sines: u32,
    factor: f32,
}

impl<'a> Batch<'a> {
    /// Of layers whose values go to buffers of so many bytes.
    pub(crate) fn new(jobs: &[LayerJob<'a>], buffer_bytes: &[u64]) -> Result<Self, BatchError> {
        let mut batch = Self::default();
        for (layer, job) in jobs.iter().enumerate() {
            let bytes = buffer_bytes.get(job.buffer);
            let bytes = *bytes.ok_or(BatchError::Buffer { layer })?;
            job.placement
                .check(job.codec.layout(), bytes)
                .map_err(|source| BatchError::Placement { layer, source })?;
            let plan = job.codec.plan(job.parts);
            let plan = plan.map_err(|source| BatchError::Layer { layer, source })?;
            batch.add(layer, job, &plan)?;
        }
        Ok(batch)
    }

    fn add(
        &mut self,
        layer: usize,
        job: &LayerJob<'a>,
        plan: &LayerPlan<'_>,
    ) -> Result<(), BatchError> {
        let layout = job.codec.layout();
        let pages = count(self.pages.len() / 4)?;
        let used = layout.tokens().div_ceil(job.placement.page_tokens);
        for page in &job.placement.pages[..used as usize] {
            self.pages.extend(page.to_le_bytes());
        }
        for group in &plan.groups {
            let angles = match job.codec.rotation() {
                Some(rotation) if group.plane == Plane::Key => self.angles_of(rotation)?,
                _ => AnglesRecord::default(),
            };
            let place = job.placement.plane(group.plane);
            let number = count(self.groups.len() / GroupRecord::BYTES)?;
            let record = GroupRecord {
                channels: count(self.classes.len())?,
                blocks: count(group.classes.len() / LANES)?,
                heads: u32::from(group.heads.end() - group.heads.start()),
                dim: count(group.dim)?,
                levels: count(plan.levels)?,
                step: group.step,
                dtype: match layout.dtype() {
                    DType::F32 => 0,
                    DType::F16 => 1,
                    DType::Bf16 => 2,
                    _ => unreachable!("a codec has no other types"),
                },
                exact: count(self.exact.len())?,
                exact_tokens: plan.exact_tokens,
                angles,
                pages,
                page_tokens: job.placement.page_tokens,
                destination: count(job.buffer)?,
                start: place.start + u64::from(group.heads.start()) * place.head_stride,
                page_stride: place.page_stride,
                token_stride: place.token_stride,
                head_stride: place.head_stride,
            };
            record.write(&mut self.groups);
            self.exact.extend_from_slice(group.exact);
            self.classes.extend_from_slice(&group.classes);
            for offset in &group.offsets {
                self.offsets.extend(offset.to_le_bytes());
            }
            for cell in &group.cells {
                let mut record = CellRecord {
                    group: number,
                    first_token: cell.tokens.start(),
                    tokens: cell.tokens.len(),
                    words: [0; LayerPlan::LEVELS],
                    word_counts: [0; LayerPlan::LEVELS],
                    outliers: count(self.outlier_values.len() / 4)?,
                    outlier_count: count(cell.outliers.len())?,
                };
                for (level, words) in cell.words.iter().enumerate() {
                    record.words[level] = count(self.words.len() / 2)?;
                    record.word_counts[level] = count(words.len() / 2)?;
                    self.words.extend_from_slice(words);
                }
                record.write(&mut self.cells);
                for state in cell.states {
                    self.states.extend(state.to_le_bytes());
                }
                for (position, value) in &cell.outliers {
                    self.outlier_positions.extend(position.to_le_bytes());
                    self.outlier_values.extend(value.to_le_bytes());
                }
                self.layer_of_cell.push(layer);
                let numbers = count(group.classes.len())? * cell.tokens.len();
                self.numbers_per_warp = self.numbers_per_warp.max(numbers);
            }
        }
        // The kernel counts cells, states and warps in 32 bits.
        count(self.layer_of_cell.len() * LANES)?;
        count(self.words.len() / 2)?;
        Ok(())
    }

    fn angles_of(&mut self, rotation: &'a Rotation) -> Result<AnglesRecord, BatchError> {
        let known = self.rotations.iter();
        let mut known = known.filter(|(known, _)| std::ptr::eq(*known, rotation));
        let places = if let Some(&(_, places)) = known.next() {
            places
        } else {
            let (cosines, sines) = rotation.cosines_and_sines();
            let mut places = [0; 2];
            for (place, angles) in places.iter_mut().zip([cosines, sines]) {
                *place = count(self.angles.len() / 4)?;
                for angle in angles {
                    self.angles.extend(angle.to_le_bytes());
                }
            }
            self.rotations.push((rotation, places));
            places
        };
        let [cosines, sines] = places;
        Ok(AnglesRecord {
            pairing: match rotation.pairing() {
                Pairing::Halves => 1,
                Pairing::Neighbours => 2,
            },
            pairs: count(rotation.channels() / 2)?,
            cosines,
            sines,
            factor: rotation.factor(),
        })
    }

    /// How many cells there are.
    pub(crate) fn cell_count(&self) -> u32 {
        u32::try_from(self.cells.len() / CellRecord::BYTES).expect("counted when they were added")
    }

    /// In the order of `Arguments` in decode.cu.
    pub(crate) fn sections(&self) -> [&[u8]; 11] {
        [
            &self.cells,
            &self.groups,
            &self.words,
            &self.states,
            &self.classes,
            &self.offsets,
            &self.outlier_positions,
            &self.outlier_values,
            &self.angles,
            &self.exact,
            &self.pages,
        ]
    }

    /// What the kernel found: every stream ended as it should, or which layer's did not.
    pub(crate) fn check(&self, results: &[u32]) -> Result<(), BatchError> {
        let mut damaged = self.layer_of_cell.iter().zip(results);
        let damaged = damaged.find(|&(_, &result)| result != DECODED);
        damaged.map_or(Ok(()), |(&layer, _)| {
            let source = PlanError::Decode(CellError::from(StreamError::Damaged).into());
            Err(BatchError::Layer { layer, source })
        })
    }
}

impl CellRecord {
    pub(crate) const BYTES: usize = 4 * 11;

    fn write(&self, out: &mut Vec<u8>) {
        let [a, b, c] = self.words;
        let [d, e, f] = self.word_counts;
        let before = [self.group, self.first_token, self.tokens];
        let after = [a, b, c, d, e, f, self.outliers, self.outlier_count];
        out.extend(before.into_iter().chain(after).flat_map(u32::to_le_bytes));
    }
}

impl GroupRecord {
    const BYTES: usize = 4 * (9 + 5 + 3 + 2 * 4);

    fn write(&self, out: &mut Vec<u8>) {
        let angles = self.angles;
        let words = [
            self.channels,
            self.blocks,
            self.heads,
            self.dim,
            self.levels,
            self.step.to_bits(),
            self.dtype,
            self.exact,
            self.exact_tokens,
            angles.pairing,
            angles.pairs,
            angles.cosines,
            angles.sines,
            angles.factor.to_bits(),
            self.pages,
            self.page_tokens,
            self.destination,
        ];
        out.extend(words.into_iter().flat_map(u32::to_le_bytes));
        let strides = [
            self.start,
            self.page_stride,
            self.token_stride,
            self.head_stride,
        ];
        out.extend(strides.into_iter().flat_map(u64::to_le_bytes));
    }
}

fn count(of: usize) -> Result<u32, BatchError> {
    u32::try_from(of).map_err(|_| BatchError::TooLarge)
}

/// `RESULT_DECODED` in decode.cu.
const DECODED: u32 = 1;
