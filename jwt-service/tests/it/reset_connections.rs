//! Connections that were kept, and that the homeserver's side resets when the next request comes: what a proxy does that
//! was restarted.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::net::{TcpListener, TcpStream};

use crate::support::{Client, Homeserver, get_token, settings};

/// A way to a homeserver, and how many connections came along it.
struct Way {
    address: SocketAddr,
    /// Once: the next bytes that come are answered with a reset.
    reset: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
}

impl Way {
    async fn to(homeserver: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let way = Self {
            address: listener.local_addr().unwrap(),
            reset: Arc::default(),
            connections: Arc::default(),
        };
        let (reset, connections) = (way.reset.clone(), way.connections.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(relay(client, homeserver, reset.clone()));
            }
        });
        way
    }
}

async fn relay(client: TcpStream, homeserver: SocketAddr, reset: Arc<AtomicBool>) {
    let mut server = TcpStream::connect(homeserver).await.unwrap();
    let mut client = client;
    {
        let (mut from_server, mut to_server) = server.split();
        let (from_client, mut to_client) = client.split();
        let there = async {
            loop {
                from_client.readable().await.unwrap();
                if reset.swap(false, Ordering::Relaxed) {
                    return;
                }
                let mut bytes = [0; 4096];
                match from_client.try_read(&mut bytes) {
                    Ok(0) => return,
                    Ok(read) => {
                        tokio::io::AsyncWriteExt::write_all(&mut to_server, &bytes[..read]).await.unwrap();
                    }
                    // Readable may be said too often.
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
            }
        };
        tokio::select! {
            () = there => {}
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        }
    }
    // With this a connection that is dropped is reset, and not closed in order.
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
}

#[tokio::test]
async fn a_connection_that_is_reset_costs_no_token() {
    let homeserver = Homeserver::with_users(&[("good", "alice")]).await;
    let way = Way::to(homeserver.address).await;
    let client = Client::new(settings());
    let body = get_token(&way.address.to_string(), "good", "alice");
    for _ in 0..2 {
        client.post("/get_token", body.clone()).await.claims();
    }
    assert_eq!(way.connections.load(Ordering::Relaxed), 1, "it is kept");
    way.reset.store(true, Ordering::Relaxed);
    client.post("/get_token", body).await.claims();
    assert_eq!(way.connections.load(Ordering::Relaxed), 2);
    assert_eq!(homeserver.lookups(), 3, "the request that met the reset did not reach it");
}
