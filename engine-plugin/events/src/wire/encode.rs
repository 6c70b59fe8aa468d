//! Writes batches, as msgspec does: integers as short as they go; maps leave out fields at their
//! default, arrays do not.

use rmp::encode::{
    ByteBuf, write_array_len, write_bin, write_f64, write_map_len, write_nil, write_sint,
    write_str, write_uint,
};

use super::{
    Batch, BlockHash, CLEARED, Event, ExtraKey, Form, Place, REMOVED, REMOVED_ALWAYS,
    REMOVED_FIELDS, Removed, STORED, STORED_ALWAYS, STORED_FIELDS, Stored,
};

pub(super) fn batch(batch: &Batch, form: Form) -> Vec<u8> {
    let mut out = Writer(ByteBuf::new());
    out.array(3);
    done(write_f64(&mut out.0, batch.timestamp));
    out.array(batch.events.len());
    for event in &batch.events {
        match event {
            Event::Stored(stored) => {
                out.event(form, STORED, &STORED_FIELDS, STORED_ALWAYS, |field| {
                    stored_field(stored, field)
                });
            }
            Event::Removed(removed) => {
                out.event(form, REMOVED, &REMOVED_FIELDS, REMOVED_ALWAYS, |field| {
                    removed_field(removed, field)
                });
            }
            Event::Cleared => out.event(form, CLEARED, &[], 0, |_| Value::Nil),
        }
    }
    out.value(&batch.rank.map_or(Value::Nil, Value::Unsigned));
    out.0.into_vec()
}

/// What a field holds.
enum Value<'a> {
    Nil,
    Unsigned(u32),
    Signed(i64),
    Text(&'a str),
    Hash(&'a BlockHash),
    Hashes(&'a [BlockHash]),
    Tokens(&'a [u32]),
    ExtraKeys(&'a [Option<Vec<ExtraKey>>]),
}

fn stored_field<'a>(stored: &'a Stored, field: &str) -> Value<'a> {
    match field {
        "block_hashes" => Value::Hashes(&stored.hashes),
        "parent_block_hash" => stored.parent.as_ref().map_or(Value::Nil, Value::Hash),
        "token_ids" => Value::Tokens(&stored.tokens),
        "block_size" => Value::Unsigned(stored.block_size),
        "lora_id" => stored.lora_id.map_or(Value::Nil, Value::Signed),
        "lora_name" => text(stored.lora_name.as_ref()),
        "extra_keys" => {
            let keys = stored.extra_keys.as_deref();
            keys.map_or(Value::Nil, Value::ExtraKeys)
        }
        "kv_cache_spec_kind" => text(stored.kind.as_ref()),
        "kv_cache_spec_sliding_window" => stored.sliding_window.map_or(Value::Nil, Value::Unsigned),
        "session_id" => text(stored.session_id.as_ref()),
        _ => place_field(&stored.place, field),
    }
}

fn removed_field<'a>(removed: &'a Removed, field: &str) -> Value<'a> {
    match field {
        "block_hashes" => Value::Hashes(&removed.hashes),
        _ => place_field(&removed.place, field),
    }
}

fn place_field<'a>(place: &'a Place, field: &str) -> Value<'a> {
    match field {
        "medium" => text(place.medium.as_ref()),
        "group_idx" => place.group.map_or(Value::Nil, Value::Unsigned),
        "locality" => text(place.locality.as_ref()),
        _ => text(place.ownership.as_ref()),
    }
}

fn text(text: Option<&String>) -> Value<'_> {
    text.map_or(Value::Nil, |text| Value::Text(text))
}

struct Writer(ByteBuf);

impl Writer {
    /// The first `always` fields have no default.
    fn event<'a>(
        &mut self,
        form: Form,
        tag: &str,
        fields: &[&str],
        always: usize,
        value: impl Fn(&str) -> Value<'a>,
    ) {
        match form {
            Form::Maps => {
                let written = |(at, field): &(usize, &&str)| {
                    *at < always || !matches!(value(field), Value::Nil)
                };
                let fields: Vec<_> = fields.iter().enumerate().filter(written).collect();
                done(write_map_len(&mut self.0, count(1 + fields.len())));
                self.text("type");
                self.text(tag);
                for (_, field) in fields {
                    self.text(field);
                    self.value(&value(field));
                }
            }
            Form::Arrays => {
                self.array(1 + fields.len());
                self.text(tag);
                for field in fields {
                    self.value(&value(field));
                }
            }
        }
    }

    fn value(&mut self, value: &Value<'_>) {
        match value {
            Value::Nil => self.nil(),
            Value::Unsigned(number) => self.unsigned(*number),
            Value::Signed(number) => self.signed(*number),
            Value::Text(text) => self.text(text),
            Value::Hash(hash) => self.hash(hash),
            Value::Hashes(hashes) => {
                self.array(hashes.len());
                hashes.iter().for_each(|hash| self.hash(hash));
            }
            Value::Tokens(tokens) => {
                self.array(tokens.len());
                tokens.iter().for_each(|token| self.unsigned(*token));
            }
            Value::ExtraKeys(blocks) => {
                self.array(blocks.len());
                for keys in *blocks {
                    let Some(keys) = keys else {
                        self.nil();
                        continue;
                    };
                    self.array(keys.len());
                    keys.iter().for_each(|key| self.extra_key(key));
                }
            }
        }
    }

    fn hash(&mut self, hash: &BlockHash) {
        match hash {
            BlockHash::Int(bits) => done(write_uint(&mut self.0, *bits)),
            BlockHash::Bytes(bytes) => done(write_bin(&mut self.0, bytes)),
        }
    }

    fn extra_key(&mut self, key: &ExtraKey) {
        match key {
            ExtraKey::Text(text) => self.text(text),
            ExtraKey::Bytes(bytes) => done(write_bin(&mut self.0, bytes)),
            ExtraKey::Item(name, offset) => {
                self.array(2);
                self.text(name);
                self.signed(*offset);
            }
        }
    }

    fn array(&mut self, length: usize) {
        done(write_array_len(&mut self.0, count(length)));
    }

    fn text(&mut self, text: &str) {
        done(write_str(&mut self.0, text));
    }

    fn unsigned(&mut self, number: u32) {
        done(write_uint(&mut self.0, number.into()));
    }

    fn signed(&mut self, number: i64) {
        done(write_sint(&mut self.0, number));
    }

    fn nil(&mut self) {
        done(write_nil(&mut self.0));
    }
}

/// A buffer in memory takes everything.
fn done<T, E: std::fmt::Debug>(written: Result<T, E>) {
    written.expect("a buffer in memory takes everything");
}

fn count(length: usize) -> u32 {
    u32::try_from(length).expect("a batch has fewer than 2^32 of anything")
}
