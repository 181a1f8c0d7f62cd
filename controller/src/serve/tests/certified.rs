//! Agents whose tokens cannot be reviewed, with certificates of their nodes.

use rcgen::{KeyPair, PublicKeyData as _};
use rustls_pki_types::PrivateKeyDer;
use switchtower_proto::tls::{ClientIdentity, client_config};
use switchtower_proto::v1::Welcome;

use super::*;

/// A key with the certificate that a controller issued.
struct Certified {
    key: KeyPair,
    certificate: Vec<u8>,
}

impl Certified {
    fn config(&self, lab: &Lab) -> Arc<rustls::ClientConfig> {
        let certificate = CertificateDer::from(self.certificate.clone());
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        Arc::new(client_config(lab.roots(), Some(ClientIdentity { certificate, key })).unwrap())
    }
}

/// Connects with a token and requests a certificate.
async fn certified(lab: &Lab, node: &str) -> Certified {
    let key = KeyPair::generate().unwrap();
    let mut agent = lab.agent(node).await;
    let hello = Hello { public_key: key.subject_public_key_info(), ..hello(node) };
    agent.send(FromAgent::Hello(hello)).await;
    let ToAgent::Welcome(Welcome { certificate, .. }) = agent.next().await else { panic!("Welcome") };
    Certified { key, certificate }
}

/// A token that expired in 2001.
fn expired(user: &str, node: &str) -> String {
    let claims = r#"{"aud":["switchtower"],"exp":1000000000,"kubernetes.io":{"pod":{"name":"a","uid":"u"}}}"#;
    token_with(user, node, &URL_SAFE_NO_PAD.encode(claims))
}

#[tokio::test]
async fn certificate_identifies_the_node_while_tokens_cannot_be_reviewed() {
    let lab = Lab::start(Limits::default()).await;
    let n1 = certified(&lab, "n1").await;
    let down = token("down", "");
    let refused = lab.dial(&down).await.err().unwrap();
    assert!(refused.message().starts_with("review_unavailable"), "{refused:?}");
    for token in [down, expired("down", "")] {
        let mut agent = lab.dial_with(n1.config(&lab), &token).await.unwrap();
        agent.welcome(hello("n1")).await;
        agent.update().await;
    }
    let mut agent = lab.dial_with(n1.config(&lab), &token("down", "")).await.unwrap();
    agent.send(FromAgent::Hello(hello("n2"))).await;
    let ToAgent::GoAway(goodbye) = agent.next().await else { panic!("GoAway") };
    assert_eq!(goodbye.reason(), GoAwayReason::NodeNameMismatch);
}

#[tokio::test]
async fn certificate_does_not_replace_a_review() {
    let lab = Lab::start(Limits::default()).await;
    let (n1, n2) = (certified(&lab, "n1").await, certified(&lab, "n2").await);
    for token in [token("refused", ""), expired("refused", "")] {
        let refused = lab.dial_with(n1.config(&lab), &token).await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused:?}");
    }
    let mut agent = lab.dial_with(n2.config(&lab), &token(USER, "n1")).await.unwrap();
    agent.welcome(hello("n1")).await;
    let issuer = NodeCertificates::new(&lab.authority).unwrap();
    let certificate = issuer.issue("n9", &n2.key.subject_public_key_info()).unwrap();
    let deleted = Certified { certificate, ..n2 };
    let refused = lab.dial_with(deleted.config(&lab), &token("down", "")).await.err().unwrap();
    assert!(refused.message().starts_with("unknown_node"), "{refused:?}");
}

#[tokio::test]
async fn certificate_of_another_ca_is_refused() {
    let [lab, elsewhere] = [Lab::start(Limits::default()).await, Lab::start(Limits::default()).await];
    let foreign = certified(&elsewhere, "n1").await.config(&lab);
    let address = lab.address;
    // The handshake or the request fails, depending on which comes first.
    let attempt = tokio::spawn(async move {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from(tls::SERVER_NAME).unwrap();
        let mut stream = tokio_rustls::TlsConnector::from(foreign).connect(name, stream).await?;
        tokio::io::AsyncReadExt::read_u8(&mut stream).await
    });
    assert!(attempt.await.unwrap().is_err());
    lab.agent("n1").await.welcome(hello("n1")).await;
}
