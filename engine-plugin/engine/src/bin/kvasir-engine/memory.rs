//! Where the KV of sequences is: in memory, or on disk in part.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use kvasir_engine::paging::Options;
use kvasir_engine::scheduler::{EngineConfig, PageSelection, PagingConfig};
use kvasir_engine::{BLOCK_TOKENS, KvDtype, KvPool, ModelConfig, Pager, ScratchBits, ScratchFile};
use kvasir_types::ByteSize;

const DEFAULT_KV_MEMORY: ByteSize = ByteSize::gib(1);
const DEFAULT_SEQUENCES: u64 = 8;
const DEFAULT_TIMEOUT: NonZeroU64 = NonZeroU64::new(Pager::TIMEOUT.as_secs()).unwrap();

#[derive(Debug, clap::Args)]
pub(super) struct MemoryArgs {
    /// Memory for KV pages. Default: enough for eight sequences of the longest context, at
    /// most 1 GiB.
    #[arg(long, value_name = "BYTES")]
    kv_memory: Option<ByteSize>,
    /// Element type of the KV pages.
    #[arg(long, value_enum, default_value_t = KvDtypeArg::F32)]
    kv_dtype: KvDtypeArg,
    /// Most tokens of a sequence, prompt and completion. Default: what the model knows.
    #[arg(long, value_name = "TOKENS")]
    context_tokens: Option<usize>,
    /// A directory on a local disk for the KV that --kv-memory does not hold. Memory then has to
    /// hold one layer of the longest sequence, no more; sequences that do not fit together take
    /// turns. Answers are the same, but for --scratch-bits and --page-share. The file has no name
    /// and is gone with the engine.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// KV of all sequences, in memory or not, in the size that it has in memory. Default: enough
    /// for eight sequences of the longest context, at most half of what is free on that disk.
    #[arg(long, value_name = "BYTES", requires = "scratch")]
    scratch_capacity: Option<ByteSize>,
    /// Bits an element in the file: 16 for as in memory, whatever --kv-dtype says; 8 for fewer
    /// bytes to move, an approximation: what comes back is within 1/254 of the largest of 32
    /// channels. What was computed over it is not stored in the cache.
    #[arg(long, value_name = "BITS", requires = "scratch", value_enum, default_value_t = ScratchBitsArg::AsInMemory)]
    scratch_bits: ScratchBitsArg,
    /// Tokens that a sequence generates before others have their turn.
    #[arg(long, value_name = "TOKENS", requires = "scratch", default_value_t = PagingConfig::TURN_BATCHES)]
    turn_tokens: NonZeroUsize,
    /// Seconds that the disk may take to complete any read or write. Then nobody waits for it any
    /// more: what is on it is computed again, or answered 503.
    #[arg(long, value_name = "SECONDS", requires = "scratch", default_value_t = DEFAULT_TIMEOUT)]
    scratch_timeout: NonZeroU64,
    /// Decoding attends to this share of a sequence's KV, the part that matters to each token, so
    /// that less is read. An approximation. Default: all of it.
    #[arg(long, value_name = "SHARE", requires = "scratch", value_parser = share)]
    page_share: Option<f32>,
    /// Sequences attend to everything up to this many tokens.
    #[arg(long, value_name = "TOKENS", requires = "page_share", default_value_t = PageSelection::FROM_TOKENS)]
    page_share_from: usize,
    /// Each layer of a --page-share reads ahead what it foresees the next one to choose. As much
    /// work again as choosing: for machines whose cores are idle while they wait for the disk.
    #[arg(long, requires = "page_share")]
    read_ahead: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum KvDtypeArg {
    F32,
    Bf16,
    F16,
}

impl From<KvDtypeArg> for KvDtype {
    fn from(arg: KvDtypeArg) -> Self {
        match arg {
            KvDtypeArg::F32 => Self::F32,
            KvDtypeArg::Bf16 => Self::Bf16,
            KvDtypeArg::F16 => Self::F16,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScratchBitsArg {
    #[value(name = "8")]
    Eight,
    #[value(name = "16")]
    AsInMemory,
}

impl From<ScratchBitsArg> for ScratchBits {
    fn from(arg: ScratchBitsArg) -> Self {
        match arg {
            ScratchBitsArg::Eight => Self::Eight,
            ScratchBitsArg::AsInMemory => Self::AsInMemory,
        }
    }
}

fn share(text: &str) -> Result<f32, &'static str> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("not above 0 and at most 1"),
    }
}

impl MemoryArgs {
    pub(super) fn dtype(&self) -> KvDtype {
        self.kv_dtype.into()
    }

    /// An engine with this memory, everything else by default.
    pub(super) fn engine(&self, model: &ModelConfig) -> anyhow::Result<EngineConfig> {
        let dtype = self.dtype();
        let context = self.context_tokens.unwrap_or(model.max_positions);
        ensure!(
            (1..=model.max_positions).contains(&context),
            "--context-tokens {context}: the model knows 1 to {}",
            model.max_positions
        );
        let piece = match &self.scratch {
            // As it lies in the file.
            Some(_) => KvPool::frame_bytes(model, dtype),
            None => 2 * BLOCK_TOKENS * model.head_dim * dtype.bytes(),
        };
        let page = (piece * model.kv_heads * model.layers) as u64;
        let eight = DEFAULT_SEQUENCES * context.div_ceil(BLOCK_TOKENS) as u64;
        let memory = self.kv_memory.unwrap_or_else(|| {
            let pages = eight.min(DEFAULT_KV_MEMORY.as_u64() / page);
            ByteSize::bytes(pages * page)
        });
        let capacity = match &self.scratch {
            None => memory.as_u64(),
            Some(directory) => self.capacity(directory, eight * page)?,
        };
        let pages = capacity / page;
        ensure!(
            pages > 0,
            "--kv-memory, or --scratch-capacity, holds not one page of {page} bytes"
        );
        let tokens = usize::try_from(pages)?.saturating_mul(BLOCK_TOKENS);
        let mut config = EngineConfig::for_tokens(tokens);
        config.kv_dtype = dtype;
        config.context_tokens = self.context_tokens;
        if let Some(directory) = &self.scratch {
            config.context_tokens = Some(context);
            config.paging = Some(self.paging(directory, model, memory, tokens, context)?);
        }
        Ok(config)
    }

    /// Bytes of KV for which there is room in the scratch file.
    fn capacity(&self, directory: &Path, wanted: u64) -> anyhow::Result<u64> {
        let disk = rustix::fs::statvfs(directory)
            .with_context(|| format!("--scratch {} is no directory", directory.display()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        match self.scratch_capacity {
            Some(capacity) if capacity.as_u64() > free => bail!(
                "--scratch-capacity {capacity} is more than the {} that are free in {}",
                ByteSize::bytes(free),
                directory.display()
            ),
            Some(capacity) => Ok(capacity.as_u64()),
            None => Ok(wanted.min(free / 2)),
        }
    }

    fn paging(
        &self,
        directory: &Path,
        model: &ModelConfig,
        memory: ByteSize,
        tokens: usize,
        context: usize,
    ) -> anyhow::Result<PagingConfig> {
        let selection = self.page_share.map(|share| PageSelection {
            options: Options {
                share,
                ..Options::default()
            },
            from_tokens: self.page_share_from,
            reads_ahead: self.read_ahead,
            // Digests of everything, if that leaves half of the memory to pages.
            digest_bytes: usize::try_from(memory.as_u64() / 2)
                .unwrap_or(usize::MAX)
                .min(PageSelection::digest_bytes_of(model, tokens)),
        });
        let digests = selection.map_or(0, |selection| selection.digest_bytes as u64);
        let frames = KvPool::frames_in(model, self.dtype(), memory.as_u64() - digests);
        let needed = context.div_ceil(BLOCK_TOKENS) * model.kv_heads;
        if frames < needed {
            let bytes = (needed * KvPool::frame_bytes(model, self.dtype())) as u64;
            // Digests take up to half.
            let bytes = ByteSize::bytes(if digests > 0 { 2 * bytes } else { bytes });
            bail!(
                "--kv-memory {memory} holds {frames} frames for pages, and one layer of {context} \
                 tokens takes {needed}: give it {bytes}, or lower --context-tokens"
            );
        }
        let file = ScratchFile::create(directory)
            .with_context(|| format!("--scratch {}", directory.display()))?;
        tracing::info!(
            scratch = %directory.display(),
            frames,
            digest_bytes = digests,
            "KV goes to disk"
        );
        Ok(PagingConfig {
            bits: self.scratch_bits.into(),
            selection,
            turn_batches: self.turn_tokens,
            timeout: Duration::from_secs(self.scratch_timeout.get()),
            ..PagingConfig::new(frames, Arc::new(file))
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Args {
        #[command(flatten)]
        memory: MemoryArgs,
    }

    /// 2 layers, 2 KV heads of 16 dimensions, 256 positions: 4 KiB a frame, padded.
    fn engine(args: &[&str]) -> anyhow::Result<EngineConfig> {
        let root = env!("CARGO_MANIFEST_DIR");
        let json = std::fs::read(format!("{root}/fixtures/llama3-gqa/config.json"))?;
        let model = ModelConfig::from_json(&json)?;
        let args = Args::try_parse_from(["kvasir-engine"].iter().chain(args))?;
        args.memory.engine(&model)
    }

    fn refusal(args: &[&str]) -> String {
        format!("{:#}", engine(args).unwrap_err())
    }

    #[test]
    fn without_a_disk_all_is_in_memory() {
        let config = engine(&[]).unwrap();
        assert_eq!((config.blocks, config.context_tokens), (8 * 16, None));
        assert!(config.paging.is_none());
        // 8 KiB a page.
        assert_eq!(engine(&["--kv-memory", "1MiB"]).unwrap().blocks, 128);
        for flag in [
            "--scratch-capacity=1MiB",
            "--page-share=0.5",
            "--turn-tokens=3",
            "--scratch-bits=8",
        ] {
            assert!(refusal(&[flag]).contains("--scratch"), "{flag}");
        }
    }

    #[test]
    fn memory_is_split_into_frames_and_digests() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = format!("--scratch={}", directory.path().display());
        let config = engine(&[
            &scratch,
            "--kv-memory=1MiB",
            "--turn-tokens=5",
            "--scratch-timeout=3",
        ])
        .unwrap();
        let paging = config.paging.unwrap();
        assert_eq!((config.blocks, config.context_tokens), (8 * 16, Some(256)));
        assert_eq!((paging.frames, paging.turn_batches.get()), (256, 5));
        assert_eq!(paging.timeout, Duration::from_secs(3));
        assert_eq!(paging.selection, None);
        assert_eq!(paging.bits, ScratchBits::AsInMemory);
        let config = engine(&[&scratch, "--scratch-bits=8"]).unwrap();
        assert_eq!(config.paging.unwrap().bits, ScratchBits::Eight);

        let config = engine(&[&scratch, "--kv-memory=1MiB", "--page-share=0.25"]).unwrap();
        let paging = config.paging.unwrap();
        let selection = paging.selection.unwrap();
        // 128 pages of 2 layers, 2 heads and 16 channels, at 4 bytes.
        assert_eq!(selection.digest_bytes, 32 << 10);
        assert_eq!(paging.frames, 256 - 8);
        assert_eq!(
            (selection.options.share, selection.from_tokens),
            (0.25, 1024)
        );

        let config = engine(&[&scratch, "--scratch-capacity=4MiB", "--context-tokens=99"]).unwrap();
        assert_eq!((config.blocks, config.context_tokens), (256, Some(99)));
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = format!("--scratch={}", directory.path().display());
        let few = refusal(&[&scratch, "--kv-memory=124KiB"]);
        let needed =
            "holds 31 frames for pages, and one layer of 256 tokens takes 32: give it 128KiB";
        assert!(few.contains(needed), "{few}");
        assert!(engine(&[&scratch, "--kv-memory=128KiB"]).is_ok());
        assert!(engine(&[&scratch, "--kv-memory=124KiB", "--context-tokens=240"]).is_ok());
        let much = refusal(&[&scratch, "--scratch-capacity=8000TiB"]);
        assert!(much.contains("is more than the"), "{much}");
        let none = refusal(&["--scratch=/nowhere/at/all"]);
        assert!(none.contains("/nowhere/at/all is no directory"), "{none}");
        let file = refusal(&[concat!(
            "--scratch=",
            env!("CARGO_MANIFEST_DIR"),
            "/Cargo.toml"
        )]);
        assert!(
            file.contains("Cargo.toml: no scratch file can be made"),
            "{file}"
        );
        for share in ["0", "1.1", "-1", "x", "NaN"] {
            let share = format!("--page-share={share}");
            assert!(
                refusal(&[&scratch, &share]).contains("not above 0"),
                "{share}"
            );
        }
        assert!(refusal(&["--context-tokens=257"]).contains("knows 1 to 256"));
    }
}
