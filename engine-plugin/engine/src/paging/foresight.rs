//! How much of what is read ahead is wanted. Where it is little, reading ahead takes disk and
//! memory from what is.

/// What became of pieces that were read ahead.
#[derive(Debug, Default)]
pub(super) struct Foresight {
    /// Of the pieces read ahead lately: those that were wanted, and all whose fate is known.
    used: u32,
    known: u32,
    /// Requests since the last one that was followed.
    refused: u32,
}

impl Foresight {
    pub(super) fn note(&mut self, used: bool) {
        self.used += u32::from(used);
        self.known += 1;
        if self.known == FORESIGHT_PIECES {
            self.used /= 2;
            self.known /= 2;
        }
    }

    /// True as long as half of it is wanted, and from time to time to see if it is again.
    pub(super) fn is_worth_it(&mut self) -> bool {
        self.refused += 1;
        let good = self.known < FORESIGHT_PIECES / 4 || 2 * self.used >= self.known;
        if good || self.refused > FORESIGHT_PAUSE {
            self.refused = 0;
        }
        self.refused == 0
    }
}

/// Pieces over which the worth of reading ahead is judged, and requests that are not followed
/// between two tries where it is little.
const FORESIGHT_PIECES: u32 = 4096;
const FORESIGHT_PAUSE: u32 = 63;
