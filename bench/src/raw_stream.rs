//! The raw limit of a gRPC stream over loopback: the same messages, nothing behind them.

use std::process::Command;
use std::time::Instant;

use bytes::Bytes;
use futures::stream::BoxStream;
use kvasir_proto::v1::{self, cache_client::CacheClient, cache_server};
use kvasir_proto::{MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, assembly};
use kvasir_server::child::ListeningChild;
use kvasir_types::{Checksum, ExtentIdx, KvLayout};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::report::median;

const RUNS: usize = 5;
const WINDOW_BYTES: u32 = 16 << 20;

/// Bytes per second of streaming the layers of `chunks` chunks from another process: the
/// median of several runs.
pub(crate) async fn bandwidth(layout: &KvLayout, chunks: usize) -> anyhow::Result<f64> {
    let server = start_server(layout.layer_bytes())?;
    let channel =
        tonic::transport::Channel::builder(format!("http://{}", server.address()).parse()?)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .tcp_nodelay(true)
            .connect()
            .await?;
    let mut client = CacheClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut speeds = Vec::with_capacity(RUNS);
    for run in 0..=RUNS {
        let begun = Instant::now();
        let request = v1::GetRequest {
            keys: vec![Bytes::new(); chunks.max(1)],
            layers: Some(v1::LayerRange {
                start: 0,
                end: layout.layers().into(),
            }),
            ..v1::GetRequest::default()
        };
        let mut stream = client.get(request).await?.into_inner();
        let mut received = 0usize;
        while let Some(message) = stream.message().await? {
            if let Some(v1::get_response::Message::Piece(piece)) = message.message {
                received += piece.piece.map_or(0, |piece| piece.data.len());
            }
        }
        // The first run opens the connection's windows.
        if run > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a benchmark's result")]
            speeds.push(received as f64 / begun.elapsed().as_secs_f64());
        }
    }
    Ok(median(&mut speeds))
}

fn start_server(layer_bytes: usize) -> anyhow::Result<ListeningChild> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["raw-stream", "--layer-bytes", &layer_bytes.to_string()]);
    Ok(ListeningChild::start(command)?)
}

/// Serves `Get` with constant bytes until killed; prints its address.
pub(crate) async fn serve(layer_bytes: usize) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);
    let data = Bytes::from(vec![0x5a; layer_bytes]);
    let checksum = Checksum::of(&data);
    tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .add_service(cache_server::CacheServer::new(Constant { data, checksum }))
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await?;
    Ok(())
}

/// Answers every get with the same bytes.
struct Constant {
    data: Bytes,
    checksum: Checksum,
}

type Answer<T> = Result<Response<T>, Status>;

fn only_get<T>() -> Answer<T> {
    Err(Status::unimplemented(
        "this server only streams constant bytes",
    ))
}

#[tonic::async_trait]
impl cache_server::Cache for Constant {
    type GetStream = BoxStream<'static, Result<v1::GetResponse, Status>>;
    type GetProfileStream = BoxStream<'static, Result<v1::GetProfileResponse, Status>>;
    type ListStream = BoxStream<'static, Result<v1::ListResponse, Status>>;
    type WatchStream = BoxStream<'static, Result<v1::WatchResponse, Status>>;
    type PathsStream = BoxStream<'static, Result<v1::PathsResponse, Status>>;
    type HoldStream = BoxStream<'static, Result<v1::HoldResponse, Status>>;

    async fn get(&self, request: Request<v1::GetRequest>) -> Answer<Self::GetStream> {
        let request = request.into_inner();
        let layers = request.layers.map_or(1, |range| range.end);
        let chunks = u32::try_from(request.keys.len()).unwrap_or(u32::MAX);
        let (data, checksum) = (self.data.clone(), self.checksum);
        let pieces = (0..layers).flat_map(move |layer| {
            let data = data.clone();
            (0..chunks).flat_map(move |chunk| {
                let layer = u16::try_from(layer).unwrap_or(u16::MAX);
                assembly::pieces(ExtentIdx(layer.into()), data.clone(), checksum).map(
                    move |piece| {
                        let piece = v1::ChunkPiece {
                            chunk,
                            piece: Some(piece),
                        };
                        Ok(v1::GetResponse {
                            message: Some(v1::get_response::Message::Piece(piece)),
                        })
                    },
                )
            })
        });
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }

    async fn hold(
        &self,
        _: Request<tonic::Streaming<v1::HoldRequest>>,
    ) -> Answer<Self::HoldStream> {
        only_get()
    }

    async fn lookup(&self, _: Request<v1::LookupRequest>) -> Answer<v1::LookupResponse> {
        only_get()
    }

    async fn put(&self, _: Request<tonic::Streaming<v1::PutRequest>>) -> Answer<v1::PutResponse> {
        only_get()
    }

    async fn pin(&self, _: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        only_get()
    }

    async fn unpin(&self, _: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        only_get()
    }

    async fn delete(&self, _: Request<v1::DeleteRequest>) -> Answer<v1::DeleteResponse> {
        only_get()
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Answer<Self::ListStream> {
        only_get()
    }

    async fn put_profile(
        &self,
        _: Request<tonic::Streaming<v1::PutProfileRequest>>,
    ) -> Answer<v1::PutProfileResponse> {
        only_get()
    }

    async fn get_profile(
        &self,
        _: Request<v1::GetProfileRequest>,
    ) -> Answer<Self::GetProfileStream> {
        only_get()
    }

    async fn list_profiles(
        &self,
        _: Request<v1::ListProfilesRequest>,
    ) -> Answer<v1::ListProfilesResponse> {
        only_get()
    }

    async fn delete_profile(
        &self,
        _: Request<v1::DeleteProfileRequest>,
    ) -> Answer<v1::DeleteProfileResponse> {
        only_get()
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Answer<v1::StatsResponse> {
        only_get()
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        only_get()
    }

    async fn paths(&self, _: Request<v1::PathsRequest>) -> Answer<Self::PathsStream> {
        only_get()
    }
}
