//! Answers to requests whose body was not read to its end. What is left of it is in the way of the next request: unless
//! it is here already and can be skipped, hyper closes the connection, and a client that means to use it again must
//! be told so.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use axum::{Router, body::Body, http::Request, response::Response};
use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use tower::ServiceExt as _;

/// What `router` answers, with `Connection: close` if the connection is closed after it.
pub(super) async fn answer(router: Router, request: Request<Incoming>) -> Result<Response, Infallible> {
    let read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
    let request = request.map(|body| Body::new(Watched { body, read: read.clone() }));
    let answer = router.oneshot(request).await;
    if !read.load(Ordering::Relaxed) {
        // hyper decides between skipping and closing when it next reads, and adds the header to heads that it writes
        // after that. The body is dropped by now, so one turn is enough.
        tokio::task::yield_now().await;
    }
    answer
}

/// A request's body that says when it was read to its end.
struct Watched {
    body: Incoming,
    read: Arc<AtomicBool>,
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.read.store(true, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
