//! The way to parts.

use super::*;
use crate::cell::Encoder;
use crate::channels::{Moments, moments};
use crate::input::{Heads, Input};
use crate::part::{PartWriter, write_length};

impl<'a> LayerCodec<'a> {
    /// How far the values of a raw layer's keys, and values, lie from the means of their
    /// channels: the root of the mean square, which steps are a multiple of. Exact tokens do
    /// not count.
    ///
    /// # Panics
    /// The layer has not the bytes that the layout says.
    pub fn deviations(&self, raw: &[u8]) -> [f32; 2] {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        self.deviations_of(&self.measure(raw))
    }

    /// The moments of all channels, by plane and group.
    fn measure(&self, raw: &[u8]) -> Vec<Vec<Moments>> {
        let counted = self.exact_tokens as usize..self.layout.tokens() as usize;
        let groups = self.planes.iter().flat_map(|shape| {
            let groups = shape.groups().map(move |group| (shape, group));
            groups.map(|(shape, group)| {
                let input = Input::Heads(self.heads(raw, shape, group));
                moments(&input, counted.clone(), shape.width)
            })
        });
        groups.collect()
    }

    fn deviations_of(&self, measured: &[Vec<Moments>]) -> [f32; 2] {
        let mut measured = measured.iter();
        let mut deviations = [0.0; 2];
        for (shape, deviation) in self.planes.iter().zip(&mut deviations) {
            let groups = measured.by_ref().take(shape.groups().count());
            let variances = groups.map(|of| of.iter().map(|of| of.variance()).sum::<f32>());
            let channels =
                f32::from(shape.heads) * f32::from(u16::try_from(shape.dim).unwrap_or(u16::MAX));
            *deviation = (variances.sum::<f32>() / channels).sqrt();
        }
        deviations
    }

    /// Codes a raw layer, with a step for level 0 of its keys and one of its values. Each
    /// level divides them by three.
    ///
    /// # Panics
    /// The layer has not the bytes that the layout says, or a step is no positive number.
    pub fn encode(&self, raw: &[u8], steps: [f32; 2]) -> EncodedLayer {
        assert_eq!(
            raw.len(),
            self.layout.layer_bytes(),
            "a layer of the layout"
        );
        self.encode_measured(raw, &[], steps)
    }

    /// As [`encode`](Self::encode), with steps that follow from the
    /// [deviations](Self::deviations). No profile is known of the layer.
    pub(crate) fn encode_by_deviations(
        &self,
        raw: &[u8],
        steps: impl FnOnce([f32; 2]) -> [f32; 2],
    ) -> EncodedLayer {
        let measured = self.measure(raw);
        let steps = steps(self.deviations_of(&measured));
        self.encode_measured(raw, &measured, steps)
    }

    /// With the moments of all groups, or of none.
    fn encode_measured(
        &self,
        raw: &[u8],
        measured: &[Vec<Moments>],
        steps: [f32; 2],
    ) -> EncodedLayer {
        assert!(
            steps.iter().all(|&step| is_step(step)),
            "steps are positive"
        );
        let exact = self.exact_tokens as usize;
        let counted = exact..self.layout.tokens() as usize;
        let mut parameters = Vec::new();
        write_length(self.exact_tokens, &mut parameters);
        let mut parts = [0, 1, 2].map(PartWriter::new);
        let mut encoder = Encoder::new();
        let mut measured = measured.iter();
        for ((in_layer, shape), step) in self.planes.iter().enumerate().zip(steps) {
            parameters.extend_from_slice(&step.to_le_bytes());
            for (number, group) in (0..).zip(shape.groups()) {
                let heads = self.heads(raw, shape, group);
                let basis = self.basis(in_layer, number);
                let input = if let Some(basis) = basis {
                    let mut rows = vec![0.0; counted.end * shape.width];
                    heads.read(0..counted.end, shape.width, &mut rows);
                    let mut coefficients = Vec::new();
                    basis.project(&rows, &mut coefficients);
                    Input::Rows(coefficients.into())
                } else {
                    Input::Heads(heads)
                };
                let of_group = measured.next().cloned();
                let of_group =
                    of_group.unwrap_or_else(|| moments(&input, counted.clone(), shape.width));
                let mut quantiser = Quantiser::of(&of_group, step);
                if let Some(basis) = basis {
                    let expected = basis.quantiser(step);
                    if quantiser.is_worth_its_bytes(&expected, &of_group) {
                        parameters.push(OF_CHUNK);
                        quantiser.write(&mut parameters);
                    } else {
                        parameters.push(OF_PROFILE);
                        quantiser = expected;
                    }
                } else {
                    quantiser.write(&mut parameters);
                }
                for part in &mut parts {
                    part.next = shape.place(part.next.level, number, 0);
                }
                if exact > 0 {
                    let place = shape.place(EXACT, number, 0);
                    let bytes = shape.dim * heads.dtype.bytes() * exact;
                    let of_heads = heads.raw.chunks_exact(self.layout.head_bytes(shape.plane));
                    parts[0].add_at(place, |out| {
                        of_heads.for_each(|head| out.extend_from_slice(&head[..bytes]));
                    });
                }
                let mut first = 0;
                while first < self.cells_of_group() {
                    let (cells, tokens) = self.at_once(first);
                    let place = (first * CELL_TOKENS, cells, tokens);
                    encoder.encode(&quantiser, &input, place, exact, &mut parts);
                    first += cells;
                }
            }
        }
        let [base, middle, finest] = parts;
        EncodedLayer {
            parts: [
                base.finish(parameters),
                middle.finish(Vec::new()),
                finest.finish(Vec::new()),
            ],
        }
    }

    fn heads<'r>(&self, raw: &'r [u8], shape: &PlaneShape, group: HeadRange) -> Heads<'r>
    where
        'a: 'r,
    {
        let place = self.layout.head_slice(shape.plane, group);
        Heads {
            raw: place.and_then(|place| raw.get(place)).unwrap_or(&[]),
            dtype: self.layout.dtype(),
            dim: shape.dim,
            tokens: self.layout.tokens() as usize,
            rotation: self.rotation.filter(|_| shape.plane == Plane::Key),
        }
    }
}
