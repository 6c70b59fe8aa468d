//! The random numbers of the corpus.

/// `SplitMix64` (Steele, Lea, Flood, 2014): the same stream in every language.
#[derive(Clone, Debug)]
pub(crate) struct Rng {
    state: u64,
}

impl Rng {
    /// A stream of its own for every seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..n`, and 0 for an `n` of 0: the high word of a 64 × 64 bit product.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let (_low, high) = self.next().carrying_mul(n, 0);
        high
    }

    /// An index into `length` items.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).expect("less than a usize")
    }

    /// A number in `low..=high`.
    pub(crate) fn between(&mut self, low: u32, high: u32) -> u32 {
        let above = self.below(u64::from(high.saturating_sub(low)) + 1);
        low + u32::try_from(above).expect("at most the difference of two u32")
    }

    /// True `permille` times of a thousand.
    pub(crate) fn chance(&mut self, permille: u32) -> bool {
        self.below(1000) < u64::from(permille)
    }

    /// One of `items`.
    ///
    /// # Panics
    /// When there is none; the lists of a [`super::Vocabulary`] are not empty.
    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.index(items.len())]
    }

    /// Fisher-Yates, from the end.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.index(i + 1);
            items.swap(i, j);
        }
    }
}

/// The seed of sample `index` of the stream `seed`.
pub(crate) fn mix(seed: u64, index: u64) -> u64 {
    Rng::new(seed.wrapping_mul(0xD134_2543_DE82_EF95).wrapping_add(index)).next()
}
