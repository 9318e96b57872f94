//! A way to a lead that can be cut.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// Carries connections to one address until it is cut.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    pub(crate) cut: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, state) = watch::channel(false);
        let task = tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let mut state = state.clone();
                tokio::spawn(async move {
                    let carry = async {
                        if let Ok(mut to) = TcpStream::connect(to).await {
                            // Either end may break it.
                            let _ = copy_bidirectional(&mut from, &mut to).await;
                        }
                    };
                    tokio::select! {
                        _ = state.wait_for(|cut| *cut) => {}
                        () = carry => {}
                    }
                });
            }
        });
        Self { address, cut, task }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}
