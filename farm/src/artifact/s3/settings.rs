//! From the configuration to the client's own settings: where the bucket is, and who we are.

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;

use super::super::path::{check, check_prefix};
use super::super::{ArtifactError, Result};
use crate::config::{ArtifactsConfig, Environment};

/// How long a connection, the next byte, one attempt, and a call with all its attempts may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(120);

const ATTEMPTS: u32 = 4;
/// The wait before the second attempt, and the longest after doubling.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// A bucket and what every object's key in it begins with: empty, or ending in `/`.
#[derive(Debug, PartialEq)]
pub(super) struct Location {
    pub(super) bucket: String,
    pub(super) prefix: String,
}

impl Location {
    /// Reads `s3://BUCKET[/PREFIX]`.
    pub(super) fn parse(url: &str) -> Result<Self> {
        let wrong =
            |reason: String| ArtifactError::Internal(format!("the artifact store's URL `{url}` {reason}").into());
        let rest = url.strip_prefix("s3://").ok_or_else(|| wrong("must have the form s3://BUCKET[/PREFIX]".into()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(c);
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(allowed) {
            let rule = "3 to 63 lowercase letters, digits, `.` or `-`";
            return Err(wrong(format!("must name a bucket of {rule}, but names `{bucket}`")));
        }
        let mut prefix = prefix.trim_end_matches('/').to_owned();
        check_prefix(&prefix).map_err(|error| wrong(format!("has a prefix that cannot be: {error}")))?;
        if !prefix.is_empty() {
            prefix.push('/');
        }
        Ok(Self { bucket: bucket.to_owned(), prefix })
    }

    /// The path below this place that `s3://BUCKET/KEY` names.
    pub(super) fn path_of(&self, address: &str) -> Option<String> {
        let (bucket, key) = address.strip_prefix("s3://")?.split_once('/')?;
        let path = key.strip_prefix(&self.prefix).filter(|_| bucket == self.bucket)?;
        check(path).ok().map(str::to_owned)
    }
}

/// A client that signs for the configured server, or for `endpoint` in its place.
pub(super) fn client(config: &ArtifactsConfig, endpoint: Option<&str>) -> Result<Client> {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .operation_attempt_timeout(ATTEMPT_TIMEOUT)
        .operation_timeout(CALL_TIMEOUT)
        .build();
    let retries =
        RetryConfig::standard().with_max_attempts(ATTEMPTS).with_initial_backoff(BACKOFF.0).with_max_backoff(BACKOFF.1);
    let http = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    let mut settings = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(http)
        .region(Region::new(config.region.clone()))
        .credentials_provider(credentials(config, &Environment::of_this_process())?)
        .timeout_config(timeouts)
        .retry_config(retries);
    if let Some(endpoint) = endpoint {
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            let message =
                format!("an artifact store's endpoint must begin with http:// or https://, but is `{endpoint}`");
            return Err(ArtifactError::Internal(message.into()));
        }
        // A bucket as a host name needs DNS of its own, which few servers other than AWS have.
        settings = settings.endpoint_url(endpoint).force_path_style(true);
    }
    Ok(Client::from_conf(settings.build()))
}

/// The configured key, else the one in the variables that every S3 tool reads.
fn credentials(config: &ArtifactsConfig, environment: &Environment) -> Result<Credentials> {
    let variable = |name| environment.get(name).map(str::to_owned);
    let fail = |message: &str| Err(ArtifactError::Internal(message.into()));
    let (id, secret, token) = match (&config.access_key_id, &config.secret_access_key) {
        (Some(id), Some(secret)) => (id.clone(), secret.0.clone(), None),
        (None, None) => match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
            (Some(id), Some(secret)) => (id, secret, variable("AWS_SESSION_TOKEN")),
            _ => {
                return fail(
                    "S3 needs a key: set `access_key_id` and `secret_access_key` under [artifacts], or \
                     AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
                );
            }
        },
        _ => return fail("`access_key_id` and `secret_access_key` under [artifacts] need each other; one is missing"),
    };
    Ok(Credentials::new(id, secret, token, None, "kiln"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn a_url_names_a_bucket_and_perhaps_a_prefix() {
        let location = |url| Location::parse(url).unwrap();
        let of = |bucket: &str, prefix: &str| Location { bucket: bucket.into(), prefix: prefix.into() };
        assert_eq!(location("s3://renders"), of("renders", ""));
        assert_eq!(location("s3://renders/"), of("renders", ""));
        assert_eq!(location("s3://renders/farm/one"), of("renders", "farm/one/"));
        assert_eq!(location("s3://renders/farm/one/"), of("renders", "farm/one/"));
    }

    #[test]
    fn an_address_in_the_bucket_is_a_path_and_no_other_is() {
        let location = Location::parse("s3://renders/farm").unwrap();
        assert_eq!(location.path_of("s3://renders/farm/uploads/a.png").as_deref(), Some("uploads/a.png"));
        for other in [
            "s3://renders/uploads/a.png",
            "s3://others/farm/uploads/a.png",
            "s3://renders/farm/../a.png",
            "s3://renders/farm/",
            "s3://renders",
            "https://renders/farm/a.png",
        ] {
            assert_eq!(location.path_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_url_without_a_proper_bucket_or_prefix_is_refused() {
        for url in ["s3:renders", "s3://", "s3:///x", "s3://Upper", "s3://ab", "s3://renders/../x", "s3://renders/a//b"]
        {
            let error = Location::parse(url).unwrap_err().to_string();
            assert!(error.contains(url), "{error}");
        }
    }

    #[test]
    fn the_configured_key_goes_before_the_environment() {
        let environment = Environment::from([
            ("AWS_ACCESS_KEY_ID", "from the environment"),
            ("AWS_SECRET_ACCESS_KEY", "its secret"),
            ("AWS_SESSION_TOKEN", "its token"),
        ]);
        let mut config = ArtifactsConfig::default();
        let found = credentials(&config, &environment).unwrap();
        assert_eq!(found.access_key_id(), "from the environment");
        assert_eq!(found.session_token(), Some("its token"));
        config.access_key_id = Some("configured".into());
        assert!(credentials(&config, &environment).unwrap_err().to_string().contains("one is missing"));
        config.secret_access_key = Some(Secret("secret".into()));
        let found = credentials(&config, &environment).unwrap();
        assert_eq!((found.access_key_id(), found.session_token()), ("configured", None));
    }

    #[test]
    fn without_any_key_the_error_says_where_to_put_one() {
        let error = credentials(&ArtifactsConfig::default(), &Environment::default()).unwrap_err().to_string();
        assert!(error.contains("access_key_id") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
    }
}
