//! Reads batches.

use rmp::Marker;
use rmp::decode::{self, NumValueReadError, ValueReadError};

use super::{
    Batch, BlockHash, CLEARED, Event, ExtraKey, Place, REMOVED, REMOVED_FIELDS, Removed, STORED,
    STORED_FIELDS, Stored, Unknown,
};

/// Why bytes are not a batch of events.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// They end within a value.
    #[error("the batch ends early, in {what}")]
    Truncated {
        /// The value.
        what: &'static str,
    },
    /// A value is of another type, or not msgpack.
    #[error("{what} is not {wanted}, at byte {at}")]
    Expected {
        /// The value.
        what: &'static str,
        /// What it should be.
        wanted: &'static str,
        /// Where it begins.
        at: usize,
    },
    /// A field that every such event has is not there.
    #[error("{event} has no {field}")]
    Missing {
        /// The event, or the batch.
        event: &'static str,
        /// The field.
        field: &'static str,
    },
    /// More follows behind the batch.
    #[error("{bytes} bytes follow behind the batch")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

pub(super) fn batch(bytes: &[u8]) -> Result<Batch, DecodeError> {
    let mut reader = Reader {
        rest: bytes,
        length: bytes.len(),
    };
    let mut batch = Batch::default();
    let fields = reader.array("the batch")?;
    for field in 0..fields {
        match field {
            0 => batch.timestamp = reader.number("the timestamp")?,
            1 => {
                for _ in 0..reader.array("events")? {
                    let event = reader.event(&mut batch.unknown)?;
                    batch.events.extend(event);
                }
            }
            2 => batch.rank = reader.optional(|it| it.integer("the rank"))?,
            _ => reader.unknown(&mut batch.unknown)?,
        }
    }
    if let Some(field) = ["timestamp", "events"].get(fields as usize) {
        let event = "the batch";
        return Err(DecodeError::Missing { event, field });
    }
    match reader.rest.len() {
        0 => Ok(batch),
        bytes => Err(DecodeError::Trailing { bytes }),
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    length: usize,
}

impl<'a> Reader<'a> {
    fn event(&mut self, unknown: &mut Unknown) -> Result<Option<Event>, DecodeError> {
        let event = "an event";
        match self.peek(event)? {
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
                let count = self.array(event)?;
                if count == 0 {
                    let field = "type";
                    return Err(DecodeError::Missing { event, field });
                }
                let tag = self.text("an event's type")?;
                self.fields(tag, count - 1, false, unknown)
            }
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => {
                let count = self.map(event)?;
                let tag = self.tag(count)?;
                self.fields(tag, count, true, unknown)
            }
            _ => Err(self.expected(event, "a map or an array")),
        }
    }

    /// The tag of a map that begins here, wherever in it.
    fn tag(&self, count: u32) -> Result<&'a str, DecodeError> {
        let mut ahead = Reader { ..*self };
        for _ in 0..count {
            if ahead.text("a field's name")? == "type" {
                return ahead.text("an event's type");
            }
            ahead.skip("a field")?;
        }
        let event = "an event";
        let field = "type";
        Err(DecodeError::Missing { event, field })
    }

    /// The fields of an event, with their names or in order.
    fn fields(
        &mut self,
        tag: &str,
        count: u32,
        named: bool,
        unknown: &mut Unknown,
    ) -> Result<Option<Event>, DecodeError> {
        let (mut stored, mut removed) = (Stored::default(), Removed::default());
        let (event, names, needed): (_, &[&str], usize) = match tag {
            STORED => (STORED, &STORED_FIELDS, 4),
            REMOVED => (REMOVED, &REMOVED_FIELDS, 1),
            CLEARED => (CLEARED, &[], 0),
            _ => ("", &[], 0),
        };
        let known = !event.is_empty();
        unknown.events += u32::from(!known);
        let mut seen = 0u32;
        for place in 0..count as usize {
            let name = if named {
                let name = self.text("a field's name")?;
                if name == "type" {
                    self.skip("an event's type")?;
                    continue;
                }
                names.iter().position(|it| *it == name)
            } else {
                Some(place).filter(|place| *place < names.len())
            };
            match name.and_then(|index| Some((index, names.get(index)?))) {
                Some((index, name)) => {
                    seen |= 1 << index;
                    if event == STORED {
                        self.stored(name, &mut stored, unknown)?;
                    } else {
                        self.removed(name, &mut removed)?;
                    }
                }
                None if known => self.unknown(unknown)?,
                None => self.skip("an event")?,
            }
        }
        let missing = (0..needed).find(|index| seen & 1 << index == 0);
        if let Some(&field) = missing.and_then(|index| names.get(index)) {
            return Err(DecodeError::Missing { event, field });
        }
        Ok(match event {
            STORED => Some(Event::Stored(Box::new(stored))),
            REMOVED => Some(Event::Removed(removed)),
            CLEARED => Some(Event::Cleared),
            _ => None,
        })
    }

    fn stored(
        &mut self,
        field: &&'static str,
        stored: &mut Stored,
        unknown: &mut Unknown,
    ) -> Result<(), DecodeError> {
        let what = *field;
        match what {
            "block_hashes" => stored.hashes = self.hashes(what)?,
            "parent_block_hash" => stored.parent = self.optional(|it| it.hash(what))?,
            "token_ids" => stored.tokens = self.tokens(what, unknown)?,
            "block_size" => stored.block_size = self.integer(what)?,
            "lora_id" => stored.lora_id = self.optional(|it| it.integer(what))?,
            "lora_name" => stored.lora_name = self.optional(|it| it.string(what))?,
            "extra_keys" => stored.extra_keys = self.extra_keys(what, unknown)?,
            "kv_cache_spec_kind" => stored.kind = self.optional(|it| it.string(what))?,
            "kv_cache_spec_sliding_window" => {
                stored.sliding_window = self.optional(|it| it.integer(what))?;
            }
            "session_id" => stored.session_id = self.optional(|it| it.string(what))?,
            _ => self.place(what, &mut stored.place)?,
        }
        Ok(())
    }

    fn removed(&mut self, field: &&'static str, removed: &mut Removed) -> Result<(), DecodeError> {
        match *field {
            "block_hashes" => removed.hashes = self.hashes(field)?,
            what => self.place(what, &mut removed.place)?,
        }
        Ok(())
    }

    fn place(&mut self, what: &'static str, place: &mut Place) -> Result<(), DecodeError> {
        match what {
            "medium" => place.medium = self.optional(|it| it.string(what))?,
            "group_idx" => place.group = self.optional(|it| it.integer(what))?,
            "locality" => place.locality = self.optional(|it| it.string(what))?,
            _ => place.ownership = self.optional(|it| it.string(what))?,
        }
        Ok(())
    }

    fn hashes(&mut self, what: &'static str) -> Result<Vec<BlockHash>, DecodeError> {
        let count = self.array(what)?;
        // A length is a claim: what it names has to be there.
        let mut hashes = Vec::with_capacity((count as usize).min(self.rest.len() / 5));
        for _ in 0..count {
            hashes.push(self.hash(what)?);
        }
        Ok(hashes)
    }

    fn hash(&mut self, what: &'static str) -> Result<BlockHash, DecodeError> {
        Ok(match self.peek(what)? {
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => {
                BlockHash::Bytes(self.bytes(what)?.into())
            }
            _ => {
                let wide: i128 = self.wide(what)?;
                // Bit for bit: SGLang's are signed.
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "msgpack has no integers outside of i64 and u64"
                )]
                BlockHash::Int(wide as u64)
            }
        })
    }

    /// Some engines publish pairs of tokens in place of tokens; nothing here takes these.
    fn tokens(
        &mut self,
        what: &'static str,
        unknown: &mut Unknown,
    ) -> Result<Vec<u32>, DecodeError> {
        let count = self.array(what)?;
        let mut tokens = Vec::with_capacity((count as usize).min(self.rest.len()));
        let mut plain = true;
        for _ in 0..count {
            match self.peek(what)? {
                Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
                    plain = false;
                    self.skip(what)?;
                }
                _ => tokens.push(self.integer(what)?),
            }
        }
        if !plain {
            unknown.fields += 1;
            tokens.clear();
        }
        Ok(tokens)
    }

    fn extra_keys(
        &mut self,
        what: &'static str,
        unknown: &mut Unknown,
    ) -> Result<Option<Vec<Option<Vec<ExtraKey>>>>, DecodeError> {
        self.optional(|it| {
            let count = it.array(what)?;
            let mut blocks = Vec::new();
            for _ in 0..count {
                blocks.push(it.optional(|it| {
                    let mut keys = Vec::new();
                    for _ in 0..it.array(what)? {
                        keys.extend(it.extra_key(what, unknown)?);
                    }
                    Ok(keys)
                })?);
            }
            Ok(blocks)
        })
    }

    fn extra_key(
        &mut self,
        what: &'static str,
        unknown: &mut Unknown,
    ) -> Result<Option<ExtraKey>, DecodeError> {
        match self.peek(what)? {
            Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                return Ok(Some(ExtraKey::Text(self.string(what)?)));
            }
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => {
                return Ok(Some(ExtraKey::Bytes(self.bytes(what)?.into())));
            }
            _ => {}
        }
        let mut ahead = Reader { ..*self };
        if let Ok(2) = ahead.array(what)
            && let (Ok(name), Ok(offset)) = (ahead.string(what), ahead.integer(what))
        {
            *self = ahead;
            return Ok(Some(ExtraKey::Item(name, offset)));
        }
        self.unknown(unknown)?;
        Ok(None)
    }

    fn unknown(&mut self, unknown: &mut Unknown) -> Result<(), DecodeError> {
        unknown.fields = unknown.fields.saturating_add(1);
        self.skip("a field")
    }

    fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        if let Some((&byte, rest)) = self.rest.split_first()
            && Marker::from_u8(byte) == Marker::Null
        {
            self.rest = rest;
            return Ok(None);
        }
        read(self).map(Some)
    }

    fn peek(&self, what: &'static str) -> Result<Marker, DecodeError> {
        let byte = self.rest.first().ok_or(DecodeError::Truncated { what })?;
        Ok(Marker::from_u8(*byte))
    }

    fn array(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        let at = self.at();
        decode::read_array_len(&mut self.rest).map_err(|error| failed(&error, what, "an array", at))
    }

    fn map(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        let at = self.at();
        decode::read_map_len(&mut self.rest).map_err(|error| failed(&error, what, "a map", at))
    }

    fn number(&mut self, what: &'static str) -> Result<f64, DecodeError> {
        match self.peek(what)? {
            Marker::F64 => {
                decode::read_f64(&mut self.rest).map_err(|_| DecodeError::Truncated { what })
            }
            Marker::F32 => decode::read_f32(&mut self.rest)
                .map(f64::from)
                .map_err(|_| DecodeError::Truncated { what }),
            _ => {
                let wide: i128 = self.wide(what)?;
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "seconds, and nobody counts on them"
                )]
                Ok(wide as f64)
            }
        }
    }

    fn integer<T: TryFrom<i128>>(&mut self, what: &'static str) -> Result<T, DecodeError> {
        let at = self.at();
        T::try_from(self.wide(what)?).map_err(|_| DecodeError::Expected {
            what,
            wanted: "a number of its range",
            at,
        })
    }

    fn wide(&mut self, what: &'static str) -> Result<i128, DecodeError> {
        let at = self.at();
        decode::read_int(&mut self.rest).map_err(|error| match error {
            NumValueReadError::TypeMismatch(_) | NumValueReadError::OutOfRange => {
                DecodeError::Expected {
                    what,
                    wanted: "an integer",
                    at,
                }
            }
            _ => DecodeError::Truncated { what },
        })
    }

    fn string(&mut self, what: &'static str) -> Result<String, DecodeError> {
        self.text(what).map(str::to_owned)
    }

    fn text(&mut self, what: &'static str) -> Result<&'a str, DecodeError> {
        let at = self.at();
        let length = decode::read_str_len(&mut self.rest)
            .map_err(|error| failed(&error, what, "text", at))?;
        let bytes = self.take(length.into(), what)?;
        std::str::from_utf8(bytes).map_err(|_| DecodeError::Expected {
            what,
            wanted: "UTF-8",
            at,
        })
    }

    fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let at = self.at();
        let length = decode::read_bin_len(&mut self.rest)
            .map_err(|error| failed(&error, what, "bytes", at))?;
        self.take(length.into(), what)
    }

    fn take(&mut self, length: u64, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let length = usize::try_from(length).ok();
        let split = length.and_then(|length| self.rest.split_at_checked(length));
        let (bytes, rest) = split.ok_or(DecodeError::Truncated { what })?;
        self.rest = rest;
        Ok(bytes)
    }

    /// Goes past one value, however deep.
    fn skip(&mut self, what: &'static str) -> Result<(), DecodeError> {
        let mut values = 1u64;
        while values > 0 {
            values -= 1;
            let marker = self.peek(what)?;
            if marker == Marker::Reserved {
                return Err(self.expected(what, "msgpack"));
            }
            self.take(1, what)?;
            let (bytes, within) = match marker {
                Marker::FixPos(_)
                | Marker::FixNeg(_)
                | Marker::Null
                | Marker::True
                | Marker::False
                | Marker::Reserved => (0, 0),
                Marker::U8 | Marker::I8 => (1, 0),
                Marker::U16 | Marker::I16 | Marker::FixExt1 => (2, 0),
                Marker::FixExt2 => (3, 0),
                Marker::U32 | Marker::I32 | Marker::F32 => (4, 0),
                Marker::FixExt4 => (5, 0),
                Marker::U64 | Marker::I64 | Marker::F64 => (8, 0),
                Marker::FixExt8 => (9, 0),
                Marker::FixExt16 => (17, 0),
                Marker::FixStr(length) => (length.into(), 0),
                Marker::Str8 | Marker::Bin8 => (self.length(1, what)?, 0),
                Marker::Str16 | Marker::Bin16 => (self.length(2, what)?, 0),
                Marker::Str32 | Marker::Bin32 => (self.length(4, what)?, 0),
                // A type, and so many bytes.
                Marker::Ext8 => (1 + self.length(1, what)?, 0),
                Marker::Ext16 => (1 + self.length(2, what)?, 0),
                Marker::Ext32 => (1 + self.length(4, what)?, 0),
                Marker::FixArray(length) => (0, length.into()),
                Marker::Array16 => (0, self.length(2, what)?),
                Marker::Array32 => (0, self.length(4, what)?),
                Marker::FixMap(length) => (0, 2 * u64::from(length)),
                Marker::Map16 => (0, 2 * self.length(2, what)?),
                Marker::Map32 => (0, 2 * self.length(4, what)?),
            };
            self.take(bytes, what)?;
            values += within;
        }
        Ok(())
    }

    /// A length of so many bytes, big-endian.
    fn length(&mut self, bytes: u64, what: &'static str) -> Result<u64, DecodeError> {
        let bytes = self.take(bytes, what)?;
        Ok(bytes
            .iter()
            .fold(0, |length, byte| length << 8 | u64::from(*byte)))
    }

    const fn at(&self) -> usize {
        self.length - self.rest.len()
    }

    fn expected(&self, what: &'static str, wanted: &'static str) -> DecodeError {
        DecodeError::Expected {
            what,
            wanted,
            at: self.at(),
        }
    }
}

fn failed(
    error: &ValueReadError,
    what: &'static str,
    wanted: &'static str,
    at: usize,
) -> DecodeError {
    match error {
        ValueReadError::TypeMismatch(_) => DecodeError::Expected { what, wanted, at },
        _ => DecodeError::Truncated { what },
    }
}
