//! A homeserver that restarts resets the connections that we have kept.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;

use crate::support::{Client, certificate, get_token, settings};

#[tokio::test]
async fn a_token_is_asked_for_again_on_a_new_connection() {
    let acceptor = TlsAcceptor::from(Arc::new(certificate()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let user = format!("@alice:{name}");
    let (asked, mut requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for connection in 0.. {
            let mut tls = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
            for request in 0.. {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(tls.read_u8().await.unwrap());
                }
                asked.send((connection, request)).unwrap();
                if (connection, request) == (0, 1) {
                    // Closed with nothing more to say, which is a reset.
                    tls.get_ref().0.set_zero_linger().unwrap();
                    break;
                }
                let body = format!("{{\"sub\":\"{user}\"}}");
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                tls.write_all(answer.as_bytes()).await.unwrap();
                tls.flush().await.unwrap();
            }
        }
    });
    let client = Client::new(settings());
    for _ in 0..2 {
        let reply = client.post("/get_token", get_token(&name, "good", "alice")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
    }
    let mut seen = Vec::new();
    while let Ok(request) = requests.try_recv() {
        seen.push(request);
    }
    assert_eq!(seen, [(0, 0), (0, 1), (1, 0)]);
}
