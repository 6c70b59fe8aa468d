//! QUIC.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kvasir_mem::Arena;
use kvasir_transport::DataPath;
use kvasir_transport::quic::{self, Identity, Listener, QuicConfig, Trust};

use crate::suite::{self, Carrier, Numbers, body, within};

const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const NAME: &str = "kvasir.test";

struct Quic {
    listener: Listener,
    identity: Identity,
}

fn config() -> QuicConfig {
    QuicConfig {
        session: suite::config(),
        idle: Duration::from_millis(600),
        most_backoff: Duration::from_millis(50),
        ..QuicConfig::default()
    }
}

fn path_to(address: SocketAddr, trust: &Trust) -> DataPath {
    quic::connect(address, NAME, trust, None, config()).unwrap()
}

impl Carrier for Quic {
    fn serve(source: Numbers) -> Self {
        let identity = Identity::self_signed(&[NAME]).unwrap();
        let source = Arc::new(source);
        let listener = Listener::new(ANYWHERE, &identity, None, source, config()).unwrap();
        Self { listener, identity }
    }

    fn arena() -> Option<Arc<Arena>> {
        None
    }

    fn connect(&self) -> DataPath {
        path_to(self.listener.address(), &self.identity.trust().unwrap())
    }

    fn astray(&self) -> [DataPath; 2] {
        let nobody = SocketAddr::new(ANYWHERE.ip(), 9);
        let stranger = Identity::self_signed(&[NAME]).unwrap().trust().unwrap();
        [
            path_to(nobody, &self.identity.trust().unwrap()),
            path_to(self.listener.address(), &stranger),
        ]
    }

    async fn restart(self, source: Numbers) -> Self {
        let Self { listener, identity } = self;
        let address = listener.address();
        drop(listener);
        // The port is free once the old endpoint is gone.
        loop {
            let source = Arc::new(source.clone());
            match Listener::new(address, &identity, None, source, config()) {
                Ok(listener) => return Self { listener, identity },
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn drain(self, within: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.listener.drain(within)
    }
}

crate::conforms!(Quic);

#[tokio::test]
async fn a_holder_can_demand_certificates() {
    let server = Identity::self_signed(&[NAME]).unwrap();
    let client = Identity::self_signed(&["client"]).unwrap();
    let stranger = Identity::self_signed(&["client"]).unwrap();
    let clients = client.trust().unwrap();
    let source = Arc::new(Numbers::default());
    let listener = Listener::new(ANYWHERE, &server, Some(&clients), source, config()).unwrap();
    let trust: Trust = server.trust().unwrap();
    for (identity, serves) in [
        (Some(&client), true),
        (Some(&stranger), false),
        (None, false),
    ] {
        let address = listener.address();
        let path = quic::connect(address, NAME, &trust, identity, config()).unwrap();
        let request = path.fetch(body(10), within(Duration::from_millis(1000)));
        assert_eq!(request.all().await.is_ok(), serves);
    }
}
