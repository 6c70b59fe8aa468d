//! Accepts a bounded number of connections.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// A connection, counted until it is dropped. It fails where its peer does not
/// soon greet: nothing else would end a silent one.
///
/// Shutting it down waits until the peer has closed its side, too. A socket that
/// is closed while bytes of the peer are still unread, such as window updates,
/// resets the connection, and what was sent but not yet delivered is lost.
#[derive(Debug)]
pub(crate) struct Counted {
    stream: TcpStream,
    /// Bytes of the greeting that have not come, and the time by which they must.
    greeting: Option<(usize, Pin<Box<Sleep>>)>,
    /// Once this side is shut: the time by which the peer must send or close.
    linger: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

/// Accepts at most `limit` connections at once. The next one waits in the kernel's
/// backlog. A peer must greet within `greeting`.
pub(crate) fn accept(
    listener: TcpListener,
    limit: u32,
    greeting: Duration,
) -> impl Stream<Item = io::Result<Counted>> + Send {
    let limit = usize::try_from(limit.max(1)).unwrap_or(Semaphore::MAX_PERMITS);
    let permits = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
    futures::stream::unfold((listener, permits), move |(listener, permits)| async move {
        let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
        let accepted = match listener.accept().await {
            Ok((stream, peer)) => Ok(counted(stream, peer, permit, greeting)),
            Err(error) => {
                // Such as too many open files; trying again at once would spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(AFTER_FAILURE).await;
                Err(error)
            }
        };
        Some((accepted, (listener, permits)))
    })
}

fn counted(
    stream: TcpStream,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
    greeting: Duration,
) -> Counted {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "cannot disable Nagle's algorithm");
    }
    Counted {
        stream,
        greeting: Some((PREFACE_BYTES, Box::pin(tokio::time::sleep(greeting)))),
        linger: None,
        _permit: permit,
    }
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some((missing, until)) = &mut self.greeting else {
            return read;
        };
        *missing = missing.saturating_sub(buf.filled().len() - before);
        if *missing == 0 {
            self.greeting = None;
        } else if read.is_pending() && until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, linger, .. } = &mut *self;
        if linger.is_none() {
            ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        }
        let linger = linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let mut unread = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut unread);
            match Pin::new(&mut *stream).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    linger.as_mut().reset(Instant::now() + LINGER);
                }
                // Closed or broken: nothing more can be delivered.
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return linger.as_mut().poll(cx).map(Ok),
            }
        }
    }
}

const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// How long a peer may take to greet.
pub(crate) const GREETING: Duration = Duration::from_secs(10);
/// How long a peer may be silent once this side is shut.
const LINGER: Duration = Duration::from_secs(2);
/// `PRI * HTTP/2.0`, and so on.
const PREFACE_BYTES: usize = 24;

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const SOON: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn a_peer_that_does_not_greet_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut accepted = Box::pin(accept(listener, 1, SOON));
        let mut silent = TcpStream::connect(addr).await.unwrap();
        let mut counted = accepted.next().await.unwrap().unwrap();
        silent.write_all(b"PRI").await.unwrap();
        let error = counted.read_exact(&mut [0; 4]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(counted);

        let mut greets = TcpStream::connect(addr).await.unwrap();
        let mut counted = accepted.next().await.unwrap().unwrap();
        greets.write_all(&[0; PREFACE_BYTES]).await.unwrap();
        counted.read_exact(&mut [0; PREFACE_BYTES]).await.unwrap();
        let mut byte = [0];
        let read = tokio::time::timeout(SOON * 2, counted.read(&mut byte)).await;
        assert!(read.is_err(), "it may be silent from then on");
    }

    #[tokio::test]
    async fn what_was_sent_before_a_shutdown_is_delivered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut accepted = Box::pin(accept(listener, 1, SOON));
        let mut peer = TcpStream::connect(addr).await.unwrap();
        let mut counted = accepted.next().await.unwrap().unwrap();
        let sent = vec![7; 1 << 20];
        // More than the peer's socket holds, so that some waits on this side.
        let sending = tokio::spawn(async move {
            counted.write_all(&sent).await.unwrap();
            counted.shutdown().await.unwrap();
        });
        peer.write_all(b"unread").await.unwrap();
        let mut received = Vec::new();
        let mut part = vec![0; 1 << 16];
        loop {
            let read = peer.read(&mut part).await.unwrap();
            if read == 0 {
                break;
            }
            received.extend_from_slice(&part[..read]);
            // Comes when the other side has already shut.
            peer.write_all(b"update").await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(received.len(), 1 << 20);
        drop(peer);
        sending.await.unwrap();
    }
}
