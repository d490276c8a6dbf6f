//! How to reach a bucket, and the SDK's client for it.

use super::clock::StoreClock;
use super::s3_reason::SayWhy;
use super::{RetryPolicy, StoreError, StoreResult};
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::{Builder, tls};
use std::fmt;

/// How to reach the bucket.
#[derive(Clone)]
pub struct S3Config {
    pub bucket: String,
    /// Empty, or a key without slashes at its ends.
    pub prefix: String,
    /// `http://host:port` or `https://host`; `None`: Amazon's, or what the AWS environment says.
    pub endpoint: Option<String>,
    /// `None`: what the AWS environment says, else `us-east-1` if there is an endpoint.
    pub region: Option<String>,
    /// The bucket as first component of the path, not as part of the host name.
    pub path_style: bool,
    /// `None`: credentials are taken where AWS tools look for them.
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<String>,
    pub session_token: Option<String>,
    /// Send and check the CRCs of newer S3 on each request, beside the MD5 of puts. Some servers
    /// do not understand them.
    pub request_checksums: bool,
    pub retry: RetryPolicy,
    /// Requests in flight at most; others wait.
    pub max_requests: usize,
}

impl Default for S3Config {
    fn default() -> Self {
        S3Config {
            bucket: String::new(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: false,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            request_checksums: false,
            retry: RetryPolicy::default(),
            max_requests: 64,
        }
    }
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = |secret: &Option<String>| secret.as_ref().map(|_| "(hidden)");
        f.debug_struct("S3Config")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("path_style", &self.path_style)
            .field("access_key_id", &self.access_key_id)
            .field("secret_access_key", &hidden(&self.secret_access_key))
            .field("session_token", &hidden(&self.session_token))
            .field("request_checksums", &self.request_checksums)
            .field("retry", &self.retry)
            .field("max_requests", &self.max_requests)
            .finish()
    }
}

impl S3Config {
    /// The client: our own retries and timeouts, hence none of the SDK's.
    pub(super) async fn client(&self, clock: StoreClock) -> StoreResult<Client> {
        let endpoint = self.endpoint.as_deref();
        if let Some(url) = endpoint
            && !url.starts_with("http://")
            && !url.starts_with("https://")
        {
            let detail = format!("the endpoint {url:?} must begin with http:// or https://");
            return Err(StoreError::Unsupported { detail });
        }
        let keys = match (&self.access_key_id, &self.secret_access_key) {
            (Some(id), Some(secret)) => {
                let token = self.session_token.clone();
                Some(Credentials::new(id, secret, token, None, "configuration"))
            }
            (None, None) => None,
            _ => {
                let detail = "access key id and secret access key are given only together";
                return Err(StoreError::Denied { detail: detail.to_owned() });
            }
        };
        // Where no TLS is needed, a machine without root certificates will do.
        let plain_http = keys.is_some() && endpoint.is_some_and(|url| url.starts_with("http://"));
        let http = if plain_http {
            Builder::new().build_http()
        } else {
            let ring = tls::rustls_provider::CryptoMode::Ring;
            Builder::new().tls_provider(tls::Provider::Rustls(ring)).build_https()
        };
        let behavior = BehaviorVersion::v2026_01_12();
        let mut loader = aws_config::defaults(behavior).http_client(http);
        if let Some(keys) = keys {
            loader = loader.credentials_provider(keys);
        }
        if let Some(url) = endpoint {
            loader = loader.endpoint_url(url);
        }
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        } else if endpoint.is_some() {
            // Not Amazon's, so Amazon's metadata service is not asked: where there is none that
            // takes seconds.
            use aws_config::environment::EnvironmentVariableRegionProvider;
            use aws_config::meta::region::RegionProviderChain;
            use aws_config::profile::ProfileFileRegionProvider;
            loader = loader.region(
                RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                    .or_else(ProfileFileRegionProvider::new())
                    .or_else(Region::from_static("us-east-1")),
            );
        }
        let shared = loader.load().await;
        let mut builder = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(self.path_style)
            .interceptor(clock)
            .interceptor(SayWhy)
            .retry_config(RetryConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder().connect_timeout(self.retry.attempt_timeout).build(),
            )
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        if shared.region().is_none() {
            if shared.endpoint_url().is_none() {
                let detail = "no region is known for the bucket: set one".to_owned();
                return Err(StoreError::NoSuchStore { detail });
            }
            builder = builder.region(Region::from_static("us-east-1"));
        }
        builder = if self.request_checksums {
            builder
                .request_checksum_calculation(RequestChecksumCalculation::WhenSupported)
                .response_checksum_validation(ResponseChecksumValidation::WhenSupported)
        } else {
            builder
                .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
                .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        };
        Ok(Client::from_conf(builder.build()))
    }
}
