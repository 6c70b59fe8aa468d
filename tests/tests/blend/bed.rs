//! A daemon, engines that blend, and prompts of documents.

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kvasir_client::{Client, GetEvent, GetOptions};
use kvasir_engine::Model;
use kvasir_engine::blend::Probes;
use kvasir_engine::scheduler::{BlendConfig, EngineConfig};
use kvasir_plugin::blend::{
    ChunkLimits, Gate, Recorder, Repair, Rule, Segment, Segmented, Selector,
};
use kvasir_plugin::{LoadPolicy, PluginConfig};
use kvasir_server::child::ListeningChild;
use kvasir_tests::harness::{self, Rig, Use, model_dir, start_daemon};
use kvasir_types::Namespace;

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_daemon");
pub(crate) const PREFIX: [u32; 1] = [1];
/// Rows that the repair may compute.
pub(crate) const BUDGET: f32 = 0.08;
/// Every token, in every layer.
pub(crate) const EVERYTHING: Selector = Selector {
    rule: Rule::Graded,
    share: 1.0,
    layers: None,
};

/// Loads whatever is there, on however busy a test machine.
pub(crate) fn patient() -> PluginConfig {
    PluginConfig {
        load: LoadPolicy::Always,
        lookup_timeout: Duration::from_secs(5),
        ..PluginConfig::default()
    }
}

/// A verdict that knows no repair.
pub(crate) fn unproven() -> Gate {
    Gate {
        version: Gate::VERSION,
        weights: String::new(),
        prefix: PREFIX.to_vec(),
        probe_layers: 4,
        probes: vec![harness::prompt(48, 14), harness::prompt(48, 21)],
        questions: 1000,
        full_exact: 0.9,
        naive_exact: 0.4,
        naive_kl: 1.0,
        naive_text: 0.1,
        repairs: Vec::new(),
    }
}

/// One that knows a repair.
pub(crate) fn proven() -> Gate {
    Gate {
        repairs: vec![Repair {
            budget: BUDGET,
            exact: 0.9,
            kl: 0.02,
            text: 0.05,
        }],
        ..unproven()
    }
}

pub(crate) struct Bed {
    pub(crate) daemon: ListeningChild,
    _data: tempfile::TempDir,
    pub(crate) client: Client,
}

impl Bed {
    pub(crate) async fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let daemon = start_daemon(DAEMON, data.path(), "127.0.0.1:0");
        let client = Client::connect(daemon.address()).await.unwrap();
        Self {
            daemon,
            _data: data,
            client,
        }
    }

    pub(crate) fn engine(&self, gate: Option<Gate>, forced: Option<Selector>) -> Rig {
        self.engine_of(gate, forced, |namespace| namespace)
    }

    pub(crate) fn engine_of(
        &self,
        gate: Option<Gate>,
        forced: Option<Selector>,
        of: impl Fn(Namespace) -> Namespace,
    ) -> Rig {
        self.engine_with(gate, forced, of, patient())
    }

    pub(crate) fn engine_with(
        &self,
        gate: Option<Gate>,
        forced: Option<Selector>,
        of: impl Fn(Namespace) -> Namespace,
        plugin: PluginConfig,
    ) -> Rig {
        let blend = gate.map(|gate| BlendConfig {
            forced,
            compile_after: NonZeroU32::MIN,
            ..BlendConfig::new(gate)
        });
        self.engine_that(blend, of, plugin)
    }

    pub(crate) fn engine_that(
        &self,
        blend: Option<BlendConfig>,
        of: impl Fn(Namespace) -> Namespace,
        plugin: PluginConfig,
    ) -> Rig {
        let model = Model::load(&model_dir()).unwrap();
        let namespace = of(harness::namespace(&model, &harness::tokenizer()));
        let mut engine = EngineConfig::for_tokens(20_000);
        engine.blend = blend;
        let address = self.daemon.address();
        Rig::start_with(Arc::new(model), namespace, engine, address, plugin)
    }

    /// Waits until the cache has every chunk, and what was recorded of it.
    pub(crate) async fn compiled(&self, rig: &Rig, prompt: &Order) {
        let Gate {
            probes: texts,
            probe_layers,
            ..
        } = unproven();
        let probes = Probes {
            texts,
            layers: probe_layers.into(),
        };
        let recorder = Recorder {
            digest: probes.digest(),
            layers: probe_layers,
        };
        let prompt = prompt.cut(rig);
        let chunks = prompt.chunks().iter().map(|it| it.key());
        let recorded = chunks.clone();
        let recorded = recorded.map(|key| recorder.key(rig.plugin.namespace(), &key));
        let keys: Vec<_> = chunks.chain(recorded).collect();
        for _ in 0..12_000 {
            let found = self.client.lookup(&keys).await.unwrap().found;
            if found.iter().all(Option::is_some) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("chunks were not compiled");
    }

    /// The bytes of every chunk of a prompt, as stored.
    pub(crate) async fn stored(&self, rig: &Rig, prompt: &Order) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for chunk in prompt.cut(rig).chunks() {
            let mut bytes = Vec::new();
            let options = GetOptions::default();
            let mut stream = self.client.get(&[chunk.key()], options).await.unwrap();
            while let Some(event) = stream.next().await.unwrap() {
                match event {
                    GetEvent::Layer { parts, .. } => bytes.extend(parts.concat()),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(bytes.len() as u64, chunk.layout().chunk_bytes());
            all.push(bytes);
        }
        all
    }
}

/// A prompt of documents, by their numbers, between a prefix and a question.
pub(crate) struct Order {
    pub(crate) tokens: Vec<u32>,
    pub(crate) chunks: Vec<Range<usize>>,
}

pub(crate) fn order(before: &[u32], documents: &[usize], question: usize) -> Order {
    let mut tokens = before.to_vec();
    let mut chunks = Vec::new();
    for &document in documents {
        let start = tokens.len();
        // Documents of several lengths, none a multiple of a page.
        tokens.extend(harness::prompt(60 + 9 * document, 7 * document));
        chunks.push(start..tokens.len());
    }
    tokens.extend(harness::prompt(12, 70 + question));
    Order { tokens, chunks }
}

impl Order {
    pub(crate) fn cut(&self, rig: &Rig) -> Segmented {
        let mut segments = Vec::new();
        let mut end = 0;
        for chunk in &self.chunks {
            segments.push(Segment::Text(self.tokens[end..chunk.start].to_vec()));
            segments.push(Segment::Chunk(self.tokens[chunk.clone()].to_vec()));
            end = chunk.end;
        }
        segments.push(Segment::Text(self.tokens[end..].to_vec()));
        let namespace = rig.plugin.namespace();
        Segmented::new(namespace, &PREFIX, ChunkLimits::default(), &segments)
    }

    pub(crate) async fn ask(&self, rig: &Rig, cache: Use) -> harness::Answer {
        rig.submit_chunks(&self.tokens, &self.chunks, cache)
            .await
            .expect("the request finishes")
    }

    pub(crate) fn chunk_tokens(&self) -> usize {
        self.chunks.iter().map(Range::len).sum()
    }
}
