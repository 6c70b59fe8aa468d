//! How eight lanes take words, for kernels whose registers move bytes by a table.

/// For a set of eight lanes that read words.
#[derive(Clone, Copy)]
pub(super) struct Spread {
    /// Which byte each byte becomes: the words go to the lanes in order.
    pub(super) places: [u8; 16],
    pub(super) count: usize,
}

pub(super) static SPREAD: [Spread; 256] = {
    let none = Spread {
        places: [NOTHING; 16],
        count: 0,
    };
    let mut all = [none; 256];
    let mut lanes = 0;
    while lanes < all.len() {
        let (mut lane, mut word) = (0, 0);
        while lane < 8 {
            if lanes >> lane & 1 == 1 {
                all[lanes].places[2 * lane] = 2 * word;
                all[lanes].places[2 * lane + 1] = 2 * word + 1;
                all[lanes].count += 1;
                word += 1;
            }
            lane += 1;
        }
        lanes += 1;
    }
    all
};

/// Becomes zero.
pub(super) const NOTHING: u8 = 0x80;
