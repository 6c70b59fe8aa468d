//! Extents cut into messages, and put together again.

use bytes::Bytes;
use kvasir_types::{Checksum, ExtentIdx};

use crate::{InvalidField, MAX_PIECE_BYTES, v1};

/// A whole extent that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeExtent {
    /// Which it is.
    pub extent: ExtentIdx,
    /// Its bytes.
    pub data: Bytes,
    /// The checksum its sender states for it.
    pub checksum: Checksum,
}

impl WholeExtent {
    /// Compares the checksum with the bytes.
    ///
    /// # Errors
    /// They do not match (field `piece.checksum`).
    pub fn verify(&self) -> Result<(), InvalidField> {
        check(self.extent, self.checksum, Checksum::of(&self.data))
    }
}

/// Whether an extent has the checksum that its sender states for it.
///
/// # Errors
/// It has not (field `piece.checksum`).
pub fn check(extent: ExtentIdx, stated: Checksum, actual: Checksum) -> Result<(), InvalidField> {
    if stated == actual {
        return Ok(());
    }
    let problem = format!("the bytes of extent {extent} do not match their CRC-64/NVME");
    Err(InvalidField::new("piece.checksum", problem))
}

/// Cuts an extent into pieces of at most [`MAX_PIECE_BYTES`], without copying.
pub fn pieces(
    extent: ExtentIdx,
    data: Bytes,
    checksum: Checksum,
) -> impl Iterator<Item = v1::ExtentPiece> {
    let total = data.len();
    let count = total.div_ceil(MAX_PIECE_BYTES).max(1);
    (0..count).map(move |index| {
        let start = index * MAX_PIECE_BYTES;
        let end = total.min(start + MAX_PIECE_BYTES);
        v1::ExtentPiece {
            extent: extent.0,
            offset: start as u64,
            data: data.slice(start..end),
            extent_bytes: total as u64,
            checksum: checksum.as_u64(),
        }
    })
}

/// Puts the pieces of one extent together again.
///
/// An extent that came as one piece, which is the usual case, is handed on without
/// a copy. No more is ever held than the extent may have.
#[derive(Debug, Default)]
pub struct Assembly {
    partial: Vec<u8>,
    /// Bytes of the extent of which some are there.
    total: u64,
}

impl Assembly {
    /// Takes the next piece; returns the extent when it is whole, not yet
    /// [verified](WholeExtent::verify).
    ///
    /// # Errors
    /// A piece of another extent than `extent`, of one with fewer or more bytes than
    /// `bounds`, out of order, empty, or beyond the extent's end.
    pub fn push(
        &mut self,
        piece: v1::ExtentPiece,
        extent: ExtentIdx,
        bounds: [u64; 2],
    ) -> Result<Option<WholeExtent>, InvalidField> {
        if piece.extent != extent.0 {
            return Err(InvalidField::new(
                "piece.extent",
                format!("extent {} came where extent {extent} was due", piece.extent),
            ));
        }
        let total = piece.extent_bytes;
        let changed = !self.partial.is_empty() && total != self.total;
        let [least, most] = bounds;
        let fits = usize::try_from(total)
            .ok()
            .filter(|_| (least..=most).contains(&total));
        let Some(expected_bytes) = fits.filter(|_| !changed) else {
            let problem = if least == most {
                format!("the extent has {most} bytes, not {total}")
            } else {
                format!("the extent has from {least} to {most} bytes, always as many; not {total}")
            };
            return Err(InvalidField::new("piece.extent_bytes", problem));
        };
        self.total = total;
        if piece.offset != self.partial.len() as u64 {
            return Err(InvalidField::new(
                "piece.offset",
                format!(
                    "offset {} came where {} was due",
                    piece.offset,
                    self.partial.len()
                ),
            ));
        }
        let received = self.partial.len() + piece.data.len();
        if (piece.data.is_empty() && total > 0) || received > expected_bytes {
            return Err(InvalidField::new(
                "piece.data",
                format!("{received} bytes of an extent of {expected_bytes}"),
            ));
        }
        let checksum = Checksum::from_u64(piece.checksum);
        let data = if received == expected_bytes && self.partial.is_empty() {
            piece.data
        } else {
            if self.partial.is_empty() {
                self.partial.reserve_exact(expected_bytes);
            }
            self.partial.extend_from_slice(&piece.data);
            if received < expected_bytes {
                return Ok(None);
            }
            Bytes::from(std::mem::take(&mut self.partial))
        };
        Ok(Some(WholeExtent {
            extent,
            data,
            checksum,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(data: &Bytes) -> [u64; 2] {
        [0, data.len() as u64]
    }

    #[test]
    fn extents_are_cut_and_joined() {
        for len in [MAX_PIECE_BYTES * 2 + 5, 5, 0] {
            let data = Bytes::from(vec![7u8; len]);
            let mut assembly = Assembly::default();
            let mut whole = None;
            let checksum = Checksum::of(&data);
            for piece in pieces(ExtentIdx(3), data.clone(), checksum) {
                assert!(whole.is_none());
                whole = assembly.push(piece, ExtentIdx(3), bounds(&data)).unwrap();
            }
            let expected = WholeExtent {
                extent: ExtentIdx(3),
                data,
                checksum,
            };
            assert_eq!(whole, Some(expected));
        }
    }

    #[test]
    fn pieces_out_of_order_are_refused() {
        let data = Bytes::from(vec![7u8; MAX_PIECE_BYTES + 5]);
        let extent = ExtentIdx(0);
        let parts: Vec<_> = pieces(extent, data.clone(), Checksum::from_u64(0)).collect();
        let all = bounds(&data);
        let mut assembly = Assembly::default();
        let mut refused = |piece: &v1::ExtentPiece, extent, bounds| {
            let error = assembly.push(piece.clone(), ExtentIdx(extent), bounds);
            error.unwrap_err().field
        };
        assert_eq!(refused(&parts[1], 0, all), "piece.offset");
        assert_eq!(refused(&parts[0], 1, all), "piece.extent");
        assert_eq!(refused(&parts[0], 0, [0, 8]), "piece.extent_bytes");
        assert_eq!(refused(&parts[0], 0, [u64::MAX; 2]), "piece.extent_bytes");
        let nothing = v1::ExtentPiece {
            data: Bytes::new(),
            ..parts[0].clone()
        };
        assert_eq!(refused(&nothing, 0, all), "piece.data");
        assert_eq!(assembly.push(parts[0].clone(), extent, all), Ok(None));
        let shorter = v1::ExtentPiece {
            extent_bytes: data.len() as u64 - 1,
            ..parts[1].clone()
        };
        let error = assembly.push(shorter, extent, all).unwrap_err();
        assert_eq!(error.field, "piece.extent_bytes");
        let whole = assembly.push(parts[1].clone(), extent, all).unwrap();
        assert_eq!(whole.unwrap().verify().unwrap_err().field, "piece.checksum");
    }
}
