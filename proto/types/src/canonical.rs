//! The canonical byte string behind every digest of this package.
//!
//! A digest is BLAKE3 in key-derivation mode: the context string separates the
//! domains (BLAKE3 paper, section 2.3), so a namespace can never collide with a
//! layout, nor a prefix chunk with a content chunk. The material is a sequence of
//! fields `tag: u8 ‖ length: u64 LE ‖ bytes`, which makes the encoding injective:
//! no two different field sequences give the same string.

/// Builds one digest from tagged, length-prefixed fields.
pub(crate) struct Canonical(blake3::Hasher);

impl Canonical {
    pub(crate) fn new(context: &str) -> Self {
        Self(blake3::Hasher::new_derive_key(context))
    }

    pub(crate) fn field(&mut self, tag: u8, bytes: &[u8]) -> &mut Self {
        self.0.update(&[tag]);
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// A field of little-endian `u32`s, fed without an intermediate copy of the whole.
    pub(crate) fn tokens(&mut self, tag: u8, tokens: &[u32]) -> &mut Self {
        self.0.update(&[tag]);
        self.0.update(&(tokens.len() as u64 * 4).to_le_bytes());
        let mut buffer = [0u8; 1024];
        for part in tokens.chunks(buffer.len() / 4) {
            for (slot, token) in buffer.chunks_exact_mut(4).zip(part) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            self.0.update(&buffer[..part.len() * 4]);
        }
        self
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

pub(crate) fn write_hex(bytes: &[u8], f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    for byte in bytes {
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

pub(crate) fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut out = [0u8; 32];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(out)
}
